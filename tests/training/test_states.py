"""States of a language model: those of the right words, kept once by many processes, and a student that learns them."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from tests.training.easy import assert_same_run, easy_records, last, tiny_config, write_jsonl
from training import run as runs
from training import states as module
from training.__main__ import main
from training.config import StatesConfig, TrainConfig
from training.data import load_dataset
from training.errors import TrainingError
from training.loop import train
from training.objectives import Classification, StateGuessing
from training.record import cost
from training.states import LanguageModel, collect, last_tokens, principal_components, read_states

TEXTS = [record["text"] for record in easy_records(60)]
LAYERS, WIDTH, VOCABULARY = 3, 16, 320


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of random weights, whose tokenizer was learned from the texts."""
    import transformers

    directory = tmp_path_factory.mktemp("language-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
        initializer_range=0.5,
    )  # fmt: skip
    transformers.LlamaModel(shape).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def config(easy_dir: Path, language_model: Path) -> Callable[..., StatesConfig]:
    def build(output_dir: Path, **changes: Any) -> StatesConfig:
        options = {"model": str(language_model), "layer": 2, "columns": 8, "dataset": "easy", "data_dir": easy_dir}
        return StatesConfig(**options | changes, output_dir=output_dir)

    return build


@pytest.fixture(scope="module")
def kept(config: Callable[..., StatesConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collect(config(tmp_path_factory.mktemp("states") / "easy"))


def test_a_word_ends_at_its_last_token() -> None:
    """Words are what stands between spaces; a token may begin with one, and the first, [CLS], stands for nothing."""
    offsets = [(0, 0), (0, 4), (4, 5), (5, 8), (9, 11)]
    assert last_tokens("good! so  it", offsets) == {0: 2, 1: 3}
    assert last_tokens("", []) == {}


def test_principal_components_have_variance_one_and_do_not_tell_of_one_another() -> None:
    generator = torch.Generator().manual_seed(1)
    states_WD = torch.randn(4000, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    states_WD[:, 2] *= 1000  # as in language models
    states_WD += 5
    states_WD[7] = torch.nan
    found = principal_components(states_WD, 3)
    known_WD = states_WD[~states_WD.isnan().any(1)]
    columns_WC = (known_WD - found["mean"]) @ found["matrix"]
    torch.testing.assert_close(torch.cov(columns_WC.T), torch.eye(3), atol=1e-3, rtol=0)
    whole = principal_components(states_WD, 6)["matrix"]
    scaled_WD = (known_WD - known_WD.mean(0)) / known_WD.std(0)
    torch.testing.assert_close(whole[:, :3], found["matrix"])
    shares_D = (scaled_WD.T @ ((known_WD - found["mean"]) @ whole)).square().sum(0)
    assert shares_D.tolist() == sorted(shares_D.tolist(), reverse=True), "the largest first"


def test_a_words_state_is_what_the_layer_says_at_its_last_token(
    kept: Path, config: Callable[..., StatesConfig], language_model: Path
) -> None:
    """Of a text by itself, whatever stood beside it; not of the first token."""
    import transformers

    model = transformers.LlamaModel.from_pretrained(language_model).to(torch.bfloat16).eval()
    tokenizer = Tokenizer.from_file(str(language_model / "tokenizer.json"))
    projection, states = load_file(kept / "projection.safetensors"), read_states(kept)
    compared = 0
    for text in TEXTS:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        with torch.inference_mode():
            said = model(torch.tensor([encoding.ids]), output_hidden_states=True).hidden_states[2][0].float()
        ends = last_tokens(text, encoding.offsets)
        found_WC = states.of(text)
        assert found_WC is not None
        assert found_WC.shape == (len(text.split()), 8)
        for word, token in ends.items():
            assert bool(found_WC[word].isnan().all()) == (token == 0)
            if token:
                expected_C = (said[token] - projection["mean"]) @ projection["matrix"]
                # Sums of other shapes are rounded otherwise in bfloat16.
                torch.testing.assert_close(found_WC[word].float(), expected_C, atol=0.15, rtol=0.05)
                compared += 1
    assert compared > 300
    assert states.of("nobody asked about this") is None


def test_a_text_that_was_asked_about_in_passages_has_their_states(kept: Path) -> None:
    """Word by word, and none for a passage that nobody asked about."""
    states = read_states(kept)
    unknown = " ".join(f"word{number}" for number in range(40)) + "."
    first, last = (found for text in TEXTS[:2] if (found := states.of(text)) is not None)
    found_WC = states.of(f"{TEXTS[0]}\n{unknown}  {TEXTS[1]}")
    assert found_WC is not None
    torch.testing.assert_close(found_WC[: len(first)], first, equal_nan=True)
    assert found_WC[len(first) : -len(last)].isnan().all()
    torch.testing.assert_close(found_WC[-len(last) :], last, equal_nan=True)
    assert len(found_WC) == len(first) + 40 + len(last)
    assert states.of(f"{unknown} {unknown}") is None
    assert states.of(f"{TEXTS[0]}<br /><br />{TEXTS[1]}") is None, "its words are others than its passages'"


def test_a_gguf_file_is_read_like_a_folder(
    kept: Path, language_model: Path, config: Callable[..., StatesConfig], tmp_path: Path
) -> None:
    path = write_gguf(language_model, tmp_path / "model.gguf")
    states, same = read_states(collect(config(tmp_path / "states", model=str(path)))), read_states(kept)
    one, other = (states.of(TEXTS[0]), same.of(TEXTS[0]))
    assert one is not None
    assert other is not None
    # A component may point either way.
    torch.testing.assert_close(one.abs(), other.abs(), atol=0.15, rtol=0.05, equal_nan=True)


def write_gguf(folder: Path, path: Path) -> Path:
    """The same model in that format, by its own library."""
    import gguf

    shape = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_rope_freq_base(shape["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape["num_hidden_layers"])
    heads, width = shape["num_attention_heads"], shape["hidden_size"]
    for name, tensor in load_file(folder / "model.safetensors").items():
        # The format keeps the two of a rotation side by side.
        rotated = name.endswith(("q_proj.weight", "k_proj.weight"))
        halves = tensor.view(heads, 2, -1, width).transpose(1, 2).reshape(width, width) if rotated else tensor
        writer.add_tensor(names.get_name(f"model.{name}", (".weight",)), halves.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_words_behind_the_cut_are_unknown(config: Callable[..., StatesConfig], tmp_path: Path) -> None:
    states = read_states(collect(config(tmp_path / "states", max_tokens=4)))
    longest = max(TEXTS, key=len)
    found_WC = states.of(longest)
    assert found_WC is not None
    assert found_WC.shape[0] == len(longest.split())
    assert bool(found_WC[-1].isnan().all())


def test_it_goes_on_where_it_was_interrupted(
    config: Callable[..., StatesConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)
    whole = collect(config(tmp_path / "whole"))
    asked: list[int] = []
    states_of = LanguageModel.states

    def tire(model: LanguageModel, texts: Sequence[str]) -> tuple[Tensor, list[int], int]:
        asked.append(len(texts))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return states_of(model, texts)

    monkeypatch.setattr(LanguageModel, "states", tire)
    with pytest.raises(KeyboardInterrupt):
        collect(config(tmp_path / "states"))
    with pytest.raises(TrainingError, match=r"holds the states of 32 of 60 texts: let .* finish"):
        read_states(tmp_path / "states")
    collect(config(tmp_path / "states"))
    assert asked == [16, 16, 16, 16, 16, 12], "the first block for the projection, too"
    for text in TEXTS:
        one, other = (read_states(path).of(text) for path in (whole, tmp_path / "states"))
        assert one is not None
        assert other is not None
        assert one.isnan().equal(other.isnan())
        assert one.nan_to_num().equal(other.nan_to_num())
    assert not list((tmp_path / "states").glob("block-*.lock"))


def test_a_block_that_another_process_has_is_left_to_it_and_taken_over_where_it_dies(
    config: Callable[..., StatesConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    monkeypatch.setattr(module, "BLOCK", 20)
    monkeypatch.setattr(module, "DEADLINE_S", 0.1)
    others = tmp_path / "states" / "block-00001.lock"
    others.parent.mkdir()
    with (
        FileLock(others.with_name("lock")),
        pytest.raises(TrainingError, match=r"at projection\.safetensors for too long"),
    ):
        collect(config(tmp_path / "states"))
    with FileLock(others), pytest.raises(TrainingError, match=r"been at block-00001\.safetensors for too long"):
        collect(config(tmp_path / "states"))
    assert {path.stem for path in others.parent.glob("block-*.safetensors")} == {"block-00000", "block-00002"}
    assert len(read_states(collect(config(tmp_path / "states"))).places) == len(set(TEXTS))


def test_a_student_learns_to_guess_the_states(kept: Path, language_model: Path, easy_dir: Path, tmp_path: Path) -> None:
    """Far better than by the mean; and what is left behind is any run's encoder."""
    config = student(easy_dir, tmp_path / "run", kept, num_epochs=12, states_weight=30.0)
    before, after = distance(config, trained=False), distance(train(config) and config, trained=True)
    assert after < 0.7 * before
    run = tmp_path / "run"
    assert set(load_file(run / runs.WEIGHTS)) == set(runs.read_model(run).state_dict())
    assert runs.read_info(run).options["states"] == runs.read_info(kept).provenance["run_id"]
    begun = train(student(easy_dir, tmp_path / "begun", None, init_from=run, num_epochs=1))
    assert runs.language_models(runs.read_info(begun)) == [language_model.name], "a later run's weights know it, too"
    assert str(kept) not in (run / runs.CONFIG).read_text()


def test_a_student_that_reads_both_ends_of_a_text_guesses_the_words_of_both(
    kept: Path, easy_dir: Path, tmp_path: Path
) -> None:
    config = student(easy_dir, tmp_path / "run", kept, max_tokens=6, tail_tokens=3, num_epochs=1)
    train(config)
    info, tokenizer = runs.read_info(config.output_dir), runs.read_tokenizer(config.output_dir)
    assert (info.encoder["max_tokens"], info.encoder["tail_tokens"]) == (6, 3)
    objective = StateGuessing(Classification(config, load_dataset("easy", easy_dir), info, None), read_states(kept))
    cut_texts = 0
    for text, ids, ends in zip(TEXTS, objective.ids, objective.ends, strict=True):
        encoding = tokenizer.encode(text)
        of_word = dict(ends.tolist())
        for word, token in of_word.items():
            alone = tokenizer.encode(text.split()[word]).ids
            assert ids[token] == alone[-1]
        cut_texts += len(encoding.ids) > 6
        assert len(text.split()) - 1 in of_word, "the last word is read, however long the text"
    assert cut_texts > 10


def student(data_dir: Path, output_dir: Path, states: Path | None, **changes: Any) -> TrainConfig:
    return tiny_config(data_dir, output_dir, states=states, token_dropout=0.0, dropout=0.0, **changes)


def distance(config: TrainConfig, trained: bool) -> float:
    """The mean distance of the guesses from the states of all training texts; untrained: that of the mean state."""
    assert config.data_dir
    assert config.states
    dataset, states = load_dataset("easy", config.data_dir), read_states(config.states)
    if not trained:
        all_WC = torch.cat([found for text in TEXTS if (found := states.of(text)) is not None]).float()
        return float(torch.nn.functional.smooth_l1_loss(all_WC.nan_to_num(), torch.zeros_like(all_WC)))
    objective = StateGuessing(Classification(config, dataset, runs.read_info(config.output_dir), None), states)
    guesser = objective.build_model()
    guesser.load_state_dict(last(config.output_dir)["model"])
    with torch.inference_mode():
        both = objective.loss(guesser, range(60), None)
        answers = objective.classification.loss_of(
            guesser.encoder(*objective.classification.inputs(range(60), CPU)), range(60)
        )
    return float(both - answers) / config.states_weight


CPU = torch.device("cpu")


def test_a_student_goes_on_where_it_was_interrupted(
    kept: Path, easy_dir: Path, tmp_path: Path, stop_at: Callable[[int], None]
) -> None:
    whole = train(student(easy_dir, tmp_path / "whole", kept, num_epochs=2))
    stop_at(13)
    parts = student(easy_dir, tmp_path / "parts", kept, num_epochs=2)
    with pytest.raises(KeyboardInterrupt):
        train(parts)
    assert last(tmp_path / "parts")["progress"]["step"] == 13
    stop_at(10**9)
    assert_same_run(train(parts), whole)


def test_texts_that_nobody_asked_about_teach_by_their_labels_alone(kept: Path, tmp_path: Path) -> None:
    known, others = easy_records(20), [one | {"text": f"{one['text']} again"} for one in easy_records(20, seed=9)]
    write_jsonl(tmp_path / "easy" / "train.jsonl", known + others)
    write_jsonl(tmp_path / "easy" / "validation.jsonl", easy_records(10, seed=5))
    run = train(student(tmp_path, tmp_path / "run", kept, num_epochs=1))
    assert runs.read_model(run)
    write_jsonl(tmp_path / "easy" / "train.jsonl", others)
    with pytest.raises(TrainingError, match=r"knows none of the 20 training texts: give the --dataset"):
        train(student(tmp_path, tmp_path / "other", kept, num_epochs=1))
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_is_said_before_anything_is_written(
    kept: Path,
    run: Path,
    easy_dir: Path,
    language_model: Path,
    config: Callable[..., StatesConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    halved = Path(shutil.copytree(language_model, tmp_path / "halved"))
    weights = load_file(halved / "model.safetensors")
    save_file(dict(sorted(weights.items())[15:]), halved / "model.safetensors", {"format": "pt"})
    for changes, complaint in (
        ({"layer": LAYERS + 1}, f"--layer {LAYERS + 1}: .* has {LAYERS} layers"),
        ({"columns": WIDTH + 1}, f"--columns {WIDTH + 1}: .* is {WIDTH} wide"),
        ({"model": str(run)}, "no causal language model can be read"),
        ({"model": str(tmp_path / "none.gguf")}, "no causal language model can be read"),
        ({"model": str(halved)}, r"no causal language model can be read \(15 weights are missing, as embed_tokens"),
    ):
        with pytest.raises(TrainingError, match=complaint):
            collect(config(tmp_path / "states", **changes))
        assert not (tmp_path / "states").exists()
    with pytest.raises(TrainingError, match=r"holds a run with other options \(layer\)"):
        collect(config(kept, layer=1))
    with pytest.raises(TrainingError, match="--layer is 0; at least 1 is needed"):
        config(tmp_path, layer=0)
    with pytest.raises(TrainingError, match="--train-share 0"):
        config(tmp_path, train_share=0)
    options = ["--dataset=easy", f"--data-dir={easy_dir}", f"--output-dir={tmp_path / 'student'}"]
    for states, complaint in (
        (run, "is a run, and holds no states: python -m training states writes them"),
        (tmp_path, "is not a run directory"),
    ):
        assert main(["train", *options, f"--states={states}"]) == 1
        assert complaint in capsys.readouterr().err
    for option in ("init-from", "teacher"):
        assert main(["train", *options, f"--{option}={kept}"]) == 1
        assert "holds a language model's states, which are for train --states" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


def test_what_it_cost_is_recorded(kept: Path, language_model: Path, tmp_path: Path) -> None:
    found = cost(kept)
    assert (found["stage"], found["dataset"], found["architecture"]) == ("states", "easy", language_model.name)
    assert found["tokens_per_second"]["median"] > 0
    assert main(["record", str(kept), f"--output={tmp_path / 'cost'}"]) == 0
    row = (tmp_path / "cost.md").read_text().splitlines()[-1]
    texts = str(json.loads((kept / "config.json").read_text())["provenance"]["texts"]["train"])
    assert [cell.strip() for cell in row.split("|")[1:5]] == ["states", "easy", texts, language_model.name]


def test_a_broken_block_is_named(kept: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(kept, tmp_path / "states"))
    (broken / "block-00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match=r"block-00000\.safetensors does not hold states of words"):
        read_states(broken)
    info = json.loads((kept / "config.json").read_text())
    assert info["options"]["model"] == Path(info["options"]["model"]).name, "no path of this machine"
