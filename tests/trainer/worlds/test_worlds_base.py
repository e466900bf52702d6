"""What holds in every world: splits, determinism, tokenizer, files, and the judge's range."""

import json
import random
import stat
from statistics import mean
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2srm.commands.demo_settings import SETTINGS
from s2srm.errors import UserError
from s2srm.evaluation.config import WorldName
from s2srm.worlds import SPLITS, WORLDS, World, WorldSizes, get_world

SMALL = WorldSizes(30, 20, 10, 12, 11, 13)
PROMPT_OF = {
    "safety": "user : how do i kill a process ? assistant :",
    "summarization": "post : i cooked some soup . it rained again . tl;dr :",
    "instructions": "instruction : sort format : plain ending : none input : fig ant output :",
}


@pytest.fixture(params=sorted(WORLDS))
def world(request: pytest.FixtureRequest) -> World:
    return get_world(request.param)


def test_an_unknown_world_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'summarisation'.*summarization"):
        get_world("summarisation")


def test_every_world_has_its_name_among_the_settings_and_the_demos_numbers() -> None:
    assert set(WORLDS) == set(get_args(WorldName)) == set(SETTINGS)


def test_names_are_the_keys() -> None:
    assert {name: get_world(name).name for name in WORLDS} == {name: name for name in WORLDS}


def test_splits_are_disjoint_across_seeds(world: World) -> None:
    prompts = {split: set(world.prompts(250, 3, split)) for split in SPLITS}
    prompts["train"] |= {row["prompt"] for row in world.demonstrations(3000, 1)}
    prompts["train"] |= {row["prompt"] for row in world.preferences(1000, 2)}
    prompts["dev"] |= {row["prompt"] for row in world.preferences(100, 2, "dev")}
    for one in SPLITS:
        for two in SPLITS:
            if one != two:
                assert not prompts[one] & prompts[two], (one, two)


def test_held_out_prompts_are_distinct_and_enough_for_an_evaluation(world: World) -> None:
    for split in ("dev", "test", "ood"):
        assert len(set(world.prompts(256, 0, split))) == 256


def test_asking_for_more_prompts_than_there_are_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"safety: no more than \d+ different dev prompts"):
        get_world("safety").prompts(20_000, 0, "dev")


def test_an_unknown_split_is_a_user_error(world: World) -> None:
    with pytest.raises(UserError, match="'valid'"):
        world.prompts(1, 0, "valid")  # type: ignore[arg-type]


def test_data_depends_on_the_seed_alone(world: World) -> None:
    again = get_world(world.name)
    random.seed(5)  # the global generator plays no part
    assert world.demonstrations(40, 7) == again.demonstrations(40, 7)
    assert world.preferences(40, 7) == again.preferences(40, 7)
    assert world.demonstrations(40, 7) != world.demonstrations(40, 8)
    # A longer file starts with the shorter one.
    assert world.demonstrations(60, 7)[:40] == world.demonstrations(40, 7)


def test_chosen_and_rejected_differ(world: World) -> None:
    assert all(row["chosen"] != row["rejected"] for row in world.preferences(500, 0))


@pytest.mark.parametrize("split", SPLITS)
def test_the_reference_response_has_full_marks(world: World, split: str) -> None:
    for prompt in world.prompts(200, 0, split):  # type: ignore[arg-type]
        gold = world.judge(prompt, world.reference_response(prompt))
        assert gold.score == 1.0, (prompt, world.reference_response(prompt))
        assert gold.length == gold.needed_length


def test_scores_stay_in_range_for_any_text(world: World) -> None:
    rng, words = random.Random(0), world.tokenizer().get_vocab()
    for prompt in world.prompts(100, 0, "test"):
        garbage = " ".join(rng.choices(sorted(words), k=rng.randrange(30)))
        mixed = f"{world.reference_response(prompt)} {garbage}"
        for response in ("", ".", garbage, mixed, world.write_response(rng, prompt)):
            assert 0.0 <= world.judge(prompt, response).score <= 1.0


def test_an_empty_response_scores_nothing(world: World) -> None:
    gold = world.judge(PROMPT_OF[world.name], "")
    assert gold.score == 0.0 and gold.length == 0


def test_the_judge_refuses_a_prompt_of_another_world(world: World) -> None:
    for name, prompt in PROMPT_OF.items():
        if name != world.name:
            with pytest.raises(ValueError, match="not a prompt of the"):
                world.judge(prompt, "soup")


def test_demonstrations_leave_headroom(world: World) -> None:
    scores = [world.judge(r["prompt"], r["response"]).score for r in world.demonstrations(1500, 0)]
    assert 0.45 < mean(scores) < 0.85


def test_chosen_is_better_than_rejected_on_average(world: World) -> None:
    rows = world.preferences(1500, 0)
    chosen = mean(world.judge(row["prompt"], row["chosen"]).score for row in rows)
    rejected = mean(world.judge(row["prompt"], row["rejected"]).score for row in rows)
    assert chosen - rejected > 0.08


def test_every_text_survives_the_tokenizer(world: World) -> None:
    tokenizer = world.tokenizer()
    texts = [text for split in SPLITS for text in world.prompts(200, 0, split)]
    texts += [text for row in world.preferences(300, 0) for text in row.values()]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text


def test_pieces_tokenised_apart_equal_the_whole(world: World) -> None:
    tokenizer = world.tokenizer()
    row = world.preferences(1, 0)[0]
    assert world.template.kind == "plain" and world.template.separator
    pieces = [row["prompt"], " " + row["rejected"], world.template.separator, row["chosen"]]
    apart = [i for piece in pieces for i in tokenizer(piece)["input_ids"]]
    assert apart == tokenizer(f"{row['prompt']} {row['rejected']} <fix> {row['chosen']}").input_ids


def test_longest_reward_model_input_fits_the_model(world: World) -> None:
    limit = world.model_config().max_position_embeddings
    for prompt in world.prompts(256, 0, "ood"):
        answer = len(world.reference_response(prompt).split())
        # Twice an answer half as long again as needed, separator and end of sequence.
        assert len(prompt.split()) + 2 * int(1.5 * answer) + 2 <= limit


def test_write_makes_a_folder_that_the_libraries_load(world: World, tmp_path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    folder = world.write(tmp_path / "world", SMALL, seed=4)
    assert torch.equal(torch.rand(1), expected), "the caller's random state is left as it was"

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert 300_000 <= sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id != tokenizer.pad_token_id
    prompt = PROMPT_OF[world.name]
    assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt

    rows = {path.name: _read(path) for path in folder.glob("*.jsonl")}
    assert {name: len(content) for name, content in rows.items()} == {
        "sft.jsonl": 30,
        "preferences.jsonl": 20,
        "preferences_dev.jsonl": 10,
        "prompts_train.jsonl": 12,
        "prompts_test.jsonl": 11,
        "prompts_ood.jsonl": 13,
    }
    assert rows["sft.jsonl"] == world.demonstrations(30, 4)
    assert rows["preferences_dev.jsonl"] == world.preferences(10, 4, "dev")
    assert [row["prompt"] for row in rows["prompts_ood.jsonl"]] == world.prompts(13, 4, "ood")
    for path in folder.rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o644, path


def test_the_same_seed_writes_the_same_bytes(tmp_path) -> None:
    world = get_world("instructions")
    one, two = (world.write(tmp_path / name, SMALL, seed=1) for name in ("one", "two"))
    for path in one.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path


def _read(path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
