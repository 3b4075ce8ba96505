"""The model card of a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from weldment.report.card import model_card
from weldment.twin.plan import TwinPlan
from weldment.version import __version__

_USE = """## Use

```python
import weldment

model = weldment.TwinModel.from_pretrained("THIS_FOLDER")    # routes every input
```

The folder is also an ordinary model, the shared one, and every folder in `experts/` that has an
`adapter_config.json` is a PEFT adapter on it:

```python
from peft import PeftModel
from transformers import SHARED_CLASS

model = PeftModel.from_pretrained(SHARED_CLASS.from_pretrained("THIS_FOLDER"), "THIS_FOLDER/experts/NAME")
```"""


def bundle_card(planned: TwinPlan, records: Sequence[Mapping[str, Any]]) -> str:
    """The text of `README.md`.

    Args:
        records: the experts', as in `twin.json`.
    """
    front = model_card(planned.merge).split("---\n")[1]
    metadata = yaml.safe_load(front)
    metadata["tags"] = ["weldment", "merge", "twin-merging"]
    rows = [
        f"| {record['name']} | {record['nbytes'] / 1e6:.2f} MB | "
        f"{'nothing differs' if record['kept'] is None else format(record['kept'], '.1%')} |"
        for record in records
    ]
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}\n---",
        "# A Twin bundle",
        "One shared model, what each expert has beyond it in compressed form, and a router that mixes these parts for "
        f"every input; built with weldment {__version__}. Method: Twin-Merging (Lu et al., NeurIPS 2024).",
        "\n".join(["| expert | size | of its squared difference kept |", "| --- | --- | --- |", *rows]),
        _USE.replace("SHARED_CLASS", planned.shared_class or "AutoModel"),
        "`twin.json` has the SHA-256 of every file, `weldment.json` the recipe and an account of the shared model.",
    ]
    return "\n\n".join(sections) + "\n"
