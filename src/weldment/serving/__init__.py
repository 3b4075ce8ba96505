"""A Twin bundle over HTTP: classification and an OpenAI-compatible interface for text.

    app.py (routes) -> wire.py (what is asked and answered)
       |                  classifying.py, writing.py: requests to rows, events to answers
       v
    batching.py (queue, one thread that owns the model) -> generation.py, sampling.py, texts.py
       |
       v
    engine.py (the model: all that is asked of `weldment.twin`)

`server.py` opens the port and ends gracefully. FastAPI, uvicorn and the Prometheus client are the extra `serve`.
"""
