"""One model by itself: every finding is provoked, and none is made of a healthy model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from doctor_models import ROWS, TOKENS, base_state, codes, only, save
from folders import write_model
from models import save_state
from weldment.doctor import diagnose
from weldment.errors import CheckpointError

CHAT = "{% for m in messages %}<|a|>{{ m.content }}{% endfor %}"


def healthy(path: Path, **changes: Any) -> Path:
    """A model with nothing wrong: tokenizer for all rows, ids that are tokens, a template."""
    tokens = [*TOKENS, "<|a|>", "<s>", "</s>", "<pad>"]
    ids = {"bos_token_id": ROWS - 3, "eos_token_id": ROWS - 2, "pad_token_id": ROWS - 1}
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "pad_token": "<pad>",
        "chat_template": changes.pop("template", CHAT),
    }
    settings |= changes.pop("settings", {})
    files = {"tokenizer_config.json": settings, "generation_config.json": changes.pop("generation", ids)}
    state = changes.pop("state", base_state(tied=changes.get("tied", True)))
    return save(path, state, tokens=changes.pop("tokens", tokens), files=files, **{**ids, **changes})


def test_a_healthy_model_gets_no_finding(tmp_path: Path) -> None:
    found = diagnose(str(healthy(tmp_path / "m")))
    assert found.findings == ()
    assert not found.has_problems
    (facts,) = found.facts
    assert (facts.rows, facts.head, facts.layers) == (ROWS, "tied", {"model.layers": 3})
    assert found.read == found.elements == facts.parameters


def test_nan_and_infinity_are_named_with_their_numbers(tmp_path: Path) -> None:
    state = base_state()
    state["model.norm.weight"][2] = torch.nan
    state["model.layers.0.mlp.up_proj.weight"][0, :2] = -torch.inf
    finding = only(diagnose(str(healthy(tmp_path / "m", state=state))), "non-finite")
    assert finding.level == "problem"
    assert finding.evidence["tensors"] == {"model.norm.weight": 1, "model.layers.0.mlp.up_proj.weight": 2}
    assert "model.norm.weight (1)" in finding.text


def test_a_matrix_of_zeros(tmp_path: Path) -> None:
    state = base_state()
    state["model.layers.1.self_attn.q_proj.weight"].zero_()
    finding = only(diagnose(str(healthy(tmp_path / "m", state=state))), "zero-matrix")
    assert "model.layers.1.self_attn.q_proj.weight" in finding.text


def test_several_dtypes_and_another_one_in_the_config(tmp_path: Path) -> None:
    state = base_state()
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].bfloat16()
    found = diagnose(str(healthy(tmp_path / "m", state=state, dtype="float16")))
    assert codes(found) == ["mixed-dtypes", "stated-dtype"]
    assert "bfloat16" in found.findings[0].text
    assert "says float16, and most of its parameters are float32" in found.findings[1].text


def test_a_model_without_config_and_tokenizer(tmp_path: Path) -> None:
    found = diagnose(str(save_state(tmp_path / "m", base_state())))
    assert codes(found) == ["no-config", "no-tokenizer"]


def test_a_single_file_without_embeddings_has_nothing_to_say_of_tokens(tmp_path: Path) -> None:
    save_file({"layers.0.w": torch.ones(3, 3)}, tmp_path / "m.safetensors")
    assert codes(diagnose(str(tmp_path / "m.safetensors"))) == ["no-config"]


class TestHead:
    def test_stored_and_different_though_declared_tied(self, tmp_path: Path) -> None:
        found = diagnose(str(healthy(tmp_path / "m", state=base_state(tied=False))))
        assert codes(found) == ["head-differs"]
        assert found.facts[0].head == "untied"

    def test_stored_twice(self, tmp_path: Path) -> None:
        state = base_state()
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        assert codes(diagnose(str(healthy(tmp_path / "m", state=state)))) == ["head-twice"]

    def test_missing_though_declared_untied(self, tmp_path: Path) -> None:
        path = healthy(tmp_path / "m", state=base_state(), tied=False, architectures=["LlamaForCausalLM"])
        assert only(diagnose(str(path)), "head-missing").level == "problem"

    def test_under_another_name_is_not_missing(self, tmp_path: Path) -> None:
        state = {**base_state(), "output.weight": torch.ones(ROWS, 16)}
        path = healthy(tmp_path / "m", state=state, tied=False, architectures=["InternLM2ForCausalLM"])
        assert diagnose(str(path)).findings == ()

    def test_an_encoder_needs_none(self, tmp_path: Path) -> None:
        path = healthy(tmp_path / "m", state=base_state(), tied=False, architectures=["BertModel"])
        assert diagnose(str(path)).findings == ()

    def test_of_its_own_as_declared(self, tmp_path: Path) -> None:
        assert diagnose(str(healthy(tmp_path / "m", tied=False))).findings == ()


class TestTokens:
    def test_more_tokens_than_rows(self, tmp_path: Path) -> None:
        finding = only(
            diagnose(str(healthy(tmp_path / "m", tokens=[*TOKENS, *"abcdef", "<|a|>", "<s>", "</s>", "<pad>"]))),
            "tokens-beyond-rows",
        )
        assert finding.level == "problem"
        assert finding.evidence == {"rows": ROWS, "highest_id": ROWS + 5, "tokens": ROWS + 6}

    def test_padding_rows_are_only_said(self, tmp_path: Path) -> None:
        path = healthy(tmp_path / "m", state=base_state(rows=ROWS + 8), rows=ROWS + 8)
        finding = only(diagnose(str(path)), "padding-rows")
        assert finding.level == "note"
        assert f"the last 8 of {ROWS + 8} rows" in finding.text

    def test_another_number_of_rows_than_the_config_says(self, tmp_path: Path) -> None:
        found = diagnose(str(healthy(tmp_path / "m", rows=ROWS - 1)))
        assert only(found, "vocab-size").level == "problem"
        assert found.has_problems

    def test_ids_beyond_the_rows(self, tmp_path: Path) -> None:
        found = diagnose(str(healthy(tmp_path / "m", generation={"eos_token_id": [ROWS - 2, 999]}, pad_token_id=-1)))
        assert codes(found) == ["id-beyond-rows", "id-beyond-rows"]
        assert [finding.level for finding in found.findings] == ["problem", "warning"]
        assert "generation_config.json says eos_token_id 999" in found.findings[0].text

    def test_ids_that_are_no_tokens(self, tmp_path: Path) -> None:
        path = healthy(tmp_path / "m", state=base_state(rows=ROWS + 8), rows=ROWS + 8, pad_token_id=ROWS + 1)
        assert "pad_token_id" in only(diagnose(str(path)), "id-without-token").text

    def test_special_tokens_that_are_not_in_the_vocabulary(self, tmp_path: Path) -> None:
        finding = only(diagnose(str(healthy(tmp_path / "m", settings={"pad_token": "<nothing>"}))), "special-token")
        assert "pad_token '<nothing>'" in finding.text

    def test_an_end_that_the_configuration_does_not_expect(self, tmp_path: Path) -> None:
        finding = only(diagnose(str(healthy(tmp_path / "m", settings={"eos_token": "<|a|>"}))), "end-token")
        assert f"token {ROWS - 4}, and the configuration expects {ROWS - 2}" in finding.text


class TestTemplate:
    def test_that_cannot_be_parsed(self, tmp_path: Path) -> None:
        finding = only(diagnose(str(healthy(tmp_path / "m", template="{% for m in messages %}"))), "chat-template")
        assert finding.level == "problem"
        assert "(line 1)" in finding.text

    def test_in_a_file_of_its_own_takes_the_place_of_the_other(self, tmp_path: Path) -> None:
        path = healthy(tmp_path / "m")
        (path / "chat_template.jinja").write_text("{{ messages[0] ")
        assert codes(diagnose(str(path))) == ["chat-template"]

    def test_one_of_several_by_name(self, tmp_path: Path) -> None:
        named = [{"name": "default", "template": CHAT}, {"name": "tools", "template": "{% endif %}"}]
        assert "'tools'" in only(diagnose(str(healthy(tmp_path / "m", template=named))), "chat-template").text

    def test_statements_of_transformers_are_known(self, tmp_path: Path) -> None:
        inner = "{% generation %}{{ m }}{%- endgeneration -%}{% if m %}{% break %}{% endif %}"
        text = "{% for m in messages %}" + inner + "{% endfor %}"
        assert diagnose(str(healthy(tmp_path / "m", template=text))).findings == ()

    def test_with_markers_that_are_no_tokens(self, tmp_path: Path) -> None:
        text = "<|a|>{{ messages }}<|im_end|><|im_end|>"
        finding = only(diagnose(str(healthy(tmp_path / "m", template=text))), "template-marker")
        assert finding.text.endswith("no tokens: <|im_end|>")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_damaged_side_files_are_no_crash(tmp_path: Path, name: str) -> None:
    path = healthy(tmp_path / "m")
    (path / name).write_text("[1, {")
    assert not diagnose(str(path)).has_problems


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    path = healthy(tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"truncated: its data end"):
        diagnose(str(path.parent))


def test_a_head_of_the_text_config(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", config={"text_config": {"vocab_size": 17, "eos_token_id": 40}})
    assert {"vocab-size", "id-beyond-rows"} <= set(codes(diagnose(str(path)), "problem"))
