"""Written tokenizers, chat templates and ids of special tokens; and that wrong ones fail the merge."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig

import weldment
from tokenizers_made import FOX, ROWS, permuted, save, tokenizer, trained
from weldment import MergeError, PlanError
from weldment.vocabulary.checks import TEXTS, check_written
from weldment.vocabulary.output import Output, united, with_tokens
from weldment.vocabulary.templates import TALK, TEMPLATES, most_common, rendered
from weldment.vocabulary.tokenizer import Tokenizer as Stored
from weldment.vocabulary.writing import with_token_ids, write_tokenizer

SHOUT = "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}"


def stored(kind: str = "bpe", text: str = FOX, name: str = "m", **more: Any) -> Stored:
    return Stored(name, trained(kind, text).encode(), **more)


def llama(folder: Path, added: list[str], *, text: str = FOX, template: str | None = None, eos: int = 1) -> Path:
    made = tokenizer(text=text, added=added)
    made.chat_template = template
    torch.manual_seed(len(added))
    config = transformers.LlamaConfig(
        vocab_size=len(made), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=0, eos_token_id=eos, pad_token_id=2,
    )  # fmt: skip
    network = transformers.LlamaForCausalLM(config)
    network.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[eos, 0], pad_token_id=2)
    return save(folder, network, made)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base without a chat template, and two with the same one; the first of them ends at a token of its own."""
    root = tmp_path_factory.mktemp("three")
    base = llama(root / "base", [])
    end = len(tokenizer())
    one = llama(root / "one", ["<|end|>", "<|im_start|>", "<|im_end|>"], template=SHOUT, eos=end)
    two = llama(root / "two", ["<|x|>"], text=ROWS, template=SHOUT)
    return base, one, two


def recipe(three: tuple[Path, Path, Path], **more: Any) -> dict[str, Any]:
    base, one, two = map(str, three)
    return {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [one, two],
        "tokenizer": {"source": "union"},
        **more,
    }


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_united_tokenizers_load_and_keep_the_first_ones_texts(tmp_path: Path, kind: str) -> None:
    first, second = stored(kind), stored(kind, ROWS, "n")
    output = with_tokens(united([first, second]), [("<|new|>", None)])
    write_tokenizer(tmp_path, output)
    check_written(tmp_path, output, output.size)
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.get_vocab() == output.tokens
    before = Tokenizer.from_str(first.raw.decode())
    if kind == "bpe":  # tokens without merges are never made of text
        for text in TEXTS:
            assert loaded.encode(text).ids == before.encode(text).ids


def test_a_token_that_another_model_added_is_one_token(tmp_path: Path) -> None:
    """`fox` is spelled by several tokens of the first model, or is one of its own; as an added token it is one."""
    added = json.loads(trained("bpe", ROWS))
    added["added_tokens"].append(
        {"id": len(added["model"]["vocab"]), "content": "fox", "special": False, "normalized": False,
         "lstrip": False, "rstrip": False, "single_word": False}
    )  # fmt: skip
    output = united([stored(), Stored("n", json.dumps(added).encode())])
    write_tokenizer(tmp_path, output)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a fox").tokens[-1] == "fox"


def test_the_union_has_ids_and_template_of_its_models(tmp_path: Path, three: tuple[Path, Path, Path]) -> None:
    out = weldment.merge(recipe(three, chat_template="auto"), tmp_path / "out").path
    made = AutoTokenizer.from_pretrained(out)
    assert made.chat_template == SHOUT
    assert made.apply_chat_template(list(TALK), tokenize=False).startswith("USER: How are you?")
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 1
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1, 0]


def test_ids_come_with_the_tokenizer(tmp_path: Path, three: tuple[Path, Path, Path]) -> None:
    out = weldment.merge(recipe(three, tokenizer={"source": str(three[1])}), tmp_path / "out").path
    end = len(tokenizer())
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == end
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [end, 0]
    assert AutoTokenizer.from_pretrained(out).chat_template == SHOUT


def test_ids_of_nested_configs() -> None:
    config = {"text_config": {"eos_token_id": 1, "hidden_size": 4}, "eos_token_id": 1}
    other = {"text_config": {"eos_token_id": 7}, "eos_token_id": 7, "hidden_size": 9}
    changed = with_token_ids(config, other, {}, {})
    assert changed == {"text_config": {"eos_token_id": 7, "hidden_size": 4}, "eos_token_id": 7}


def test_ids_that_the_other_does_not_state_go_with_their_tokens() -> None:
    old, new = {"<s>": 0, "<pad>": 2, "<gone>": 3}, {"<pad>": 0, "<s>": 5}
    config = {"bos_token_id": 0, "pad_token_id": 2, "sep_token_id": 3, "eos_token_id": [0, 3], "mask_token_id": None}
    moved = {"bos_token_id": 9, "pad_token_id": 0, "eos_token_id": [5], "mask_token_id": None}
    assert with_token_ids(config, {"bos_token_id": 9}, old, new) == moved
    assert with_token_ids(config, {}, {}, new) == config


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_are_rendered(tmp_path: Path, three: tuple[Path, Path, Path], name: str) -> None:
    out = weldment.merge(recipe(three, chat_template=name), tmp_path / "out").path
    text = AutoTokenizer.from_pretrained(out).apply_chat_template(
        list(TALK), tokenize=False, add_generation_prompt=True
    )
    assert text == rendered(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    assert all(message["content"] in text for message in TALK)


def test_a_template_as_text_or_of_a_model(tmp_path: Path, three: tuple[Path, Path, Path]) -> None:
    only = {"merge_method": "linear", "models": [str(three[1])], "chat_template": "{{ messages[0].content }}!"}
    out = weldment.merge(only, tmp_path / "text").path
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages[0].content }}!"
    assert (out / "tokenizer.json").read_bytes() == (three[1] / "tokenizer.json").read_bytes()
    out = weldment.merge(recipe(three, chat_template=str(three[2])), tmp_path / "model").path
    assert AutoTokenizer.from_pretrained(out).chat_template == SHOUT


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{% for %}", r"cannot be parsed: .*line 1"),
        ("chatmll", "there is no chat template 'chatmll'"),
        ("BASE", "has no chat template"),
    ],
)
def test_templates_that_are_none(three: tuple[Path, Path, Path], template: str, cause: str) -> None:
    with pytest.raises(PlanError, match=cause):
        weldment.plan(recipe(three, chat_template=str(three[0]) if template == "BASE" else template))


def test_a_template_that_cannot_be_rendered_fails_the_merge(tmp_path: Path, three: tuple[Path, Path, Path]) -> None:
    with pytest.raises(MergeError, match="cannot be rendered: no"):
        weldment.merge(recipe(three, chat_template="{{ raise_exception('no') }}"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_templates_may_mark_what_the_model_writes() -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert rendered(template, {}) == TALK[0]["content"]


def test_the_most_common_template() -> None:
    assert most_common([None, "a", "b", "b"]) == "b"
    assert most_common(["a", "b"]) == "a"
    assert most_common([None]) is None


def failing(folder: Path, output: Output, rows: int) -> str:
    with pytest.raises(MergeError) as error:
        check_written(folder, output, rows)
    return str(error.value)


def test_checks_find_what_is_wrong(tmp_path: Path) -> None:
    output = Output(stored())
    write_tokenizer(tmp_path, output)
    check_written(tmp_path, output, output.size)
    assert "its highest row is" in failing(tmp_path, output, output.size - 1)
    other, _ = permuted(tokenizer())
    moved = replace(output, start=Stored("m", other.backend_tokenizer.to_str().encode()))
    assert "lie at other rows than their embeddings" in failing(tmp_path, moved, output.size)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [1, 9999]}))
    assert "config.json says eos_token_id [1, 9999]" in failing(tmp_path, output, output.size)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "cannot be loaded" in failing(tmp_path, output, output.size)


def test_checks_find_special_tokens_and_texts_that_no_longer_come_back(tmp_path: Path) -> None:
    output = Output(stored())
    write_tokenizer(tmp_path, output)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    content["added_tokens"] = content["added_tokens"][1:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    # Made from a tokenizer that brings capitals back; the promise is broken by what was written.
    changed = with_tokens(output, [])
    message = failing(tmp_path, replace(changed, promoted={"the": {"special": False}}), output.size)
    assert "special tokens are not one token in text: '<s>'" in message
    assert "comes back as" in message


def test_a_template_that_fails_in_arithmetic_fails_the_merge(tmp_path: Path, three: tuple[Path, Path, Path]) -> None:
    with pytest.raises(MergeError, match="cannot be rendered: division"):
        weldment.merge(recipe(three, chat_template="{{ 1 / 0 }}"), tmp_path / "out")


def test_unknown_filters_are_found_before_the_merge(three: tuple[Path, Path, Path]) -> None:
    with pytest.raises(PlanError, match=r"cannot be parsed: No filter named 'shout'"):
        weldment.plan(recipe(three, chat_template="{{ messages | shout }}"))


def with_templates(folder: Path, three: tuple[Path, Path, Path], written: str) -> Path:
    """A model with a usual template and one for tools, in the settings or in files."""
    named = {"default": SHOUT, "tools": "{{ tools }}"}
    shutil.copytree(three[1], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if written == "settings":
        settings["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    else:
        (folder / "chat_template.jinja").write_text(SHOUT)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").write_text(named["tools"])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(folder).chat_template == named
    return folder


@pytest.mark.parametrize("written", ["settings", "files"])
def test_templates_by_name_stay_unless_another_is_asked_for(
    tmp_path: Path, three: tuple[Path, Path, Path], written: str
) -> None:
    model = with_templates(tmp_path / "model", three, written)
    only = {"merge_method": "linear", "models": [str(three[2]), str(model)], "tokenizer": {"source": str(model)}}
    kept = weldment.merge({**only, "chat_template": "auto"}, tmp_path / "auto").path
    assert AutoTokenizer.from_pretrained(kept).chat_template == {"default": SHOUT, "tools": "{{ tools }}"}
    replaced = weldment.merge({**only, "chat_template": "chatml"}, tmp_path / "chatml").path
    assert AutoTokenizer.from_pretrained(replaced).chat_template == TEMPLATES["chatml"]


def test_the_template_of_a_processor_stays_or_is_replaced(tmp_path: Path) -> None:
    for name, output in {
        "kept": united([stored(), stored("bpe", ROWS)]),
        "new": Output(stored(), template="{}"),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": SHOUT}))
        write_tokenizer(folder, output)
        wanted = SHOUT if name == "kept" else "{}"
        assert json.loads((folder / "chat_template.json").read_text()) == {"chat_template": wanted}


def test_blocks_nested_too_deep_are_found_before_the_merge(three: tuple[Path, Path, Path]) -> None:
    depth = 30
    template = "{% for m in messages %}" * depth + "{{ m }}" + "{% endfor %}" * depth
    with pytest.raises(PlanError, match=r"cannot be parsed: too many statically nested blocks"):
        weldment.plan(recipe(three, chat_template=template))


def test_ids_that_the_model_of_the_tokenizer_has_not_are_left_out(
    tmp_path: Path, three: tuple[Path, Path, Path]
) -> None:
    """Those of the base mean other tokens, or none."""
    other = shutil.copytree(three[2], tmp_path / "other")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((other / name).read_text())
        del content["pad_token_id"]
        (other / name).write_text(json.dumps(content))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_text((other / name).read_text().replace("<pad>", "<gap>"))
    out = weldment.merge(recipe((three[0], three[1], other), tokenizer={"source": str(other)}), tmp_path / "out").path
    for name in ("config.json", "generation_config.json"):
        written = json.loads((out / name).read_text())
        assert "pad_token_id" not in written
        assert written["bos_token_id"] == 0


def test_an_added_token_inside_a_longer_one_is_no_marker(tmp_path: Path) -> None:
    content = json.loads(trained("bpe", FOX))
    size = len(content["model"]["vocab"])
    flags = {"special": False, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    content["added_tokens"] += [
        {"id": size + n, "content": text, **flags} for n, text in enumerate(["    ", "<|turn|>", "   "])
    ]
    start = Stored("m", json.dumps(content).encode(), {"chat_template": "<|turn|>    {{ messages[0].content }}"})
    for output in (Output(start), united([start, stored("bpe", ROWS, "n")]), united([stored(), start])):
        made = replace(output, template=start.template)
        write_tokenizer(tmp_path, made)
        check_written(tmp_path, made, made.size)
