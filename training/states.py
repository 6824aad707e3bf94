"""What a pretrained language model makes of each word of the training texts, kept for `train --states`.

A label says one thing of a text; the states say something of each word where it stands. They are those of a middle
layer at the last piece of each word, as principal components: Romero et al. 2014, arXiv 1412.6550; Jiao et al. 2019,
arXiv 1909.10351.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from training import run as runs
from training.batches import sorted_batches
from training.config import StatesConfig
from training.data import Dataset, draw_share, load_dataset, passages
from training.errors import TrainingError
from training.metrics import Meter
from training.prepare import check_texts, provenance, recorded_options, standing_run
from training.run import RunInfo

PROJECTION = "projection.safetensors"
BLOCK = 2000
"""Texts in one file: what an interruption costs at most."""
TOKENS_AT_ONCE = 2048
DEADLINE_S = 1800.0
"""A block takes a minute, on a slow machine many; so long one process waits for what another has begun."""
WORD = re.compile(r"\S+")
Words = dict[int, int]
"""The place of a word in its text, and of its last token."""


def last_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> Words:
    """Where each word (what stands between spaces) ends among tokens that stand at these characters of the text."""
    word_at = {match.end(): word for word, match in enumerate(WORD.finditer(text))}
    return {word_at[end]: token for token, (start, end) in enumerate(offsets) if end > start and end in word_at}


@dataclass(frozen=True)
class States:
    """The kept states: per text, (words, columns) float16, NaN where the language model did not see a word's end."""

    columns: int
    blocks: Sequence[Tensor]
    places: dict[int, tuple[int, int, int]]

    def of(self, text: str) -> Tensor | None:
        """The text's own or else those of its passages; None where the language model was asked about neither."""
        if (own := self._kept(text)) is not None:
            return own
        parts = [(passage, self._kept(passage)) for passage in passages(text)]
        between = sum(len(passage.split()) for passage, _ in parts) != len(text.split())  # marks of lines, as in <br />
        if between or all(states is None for _, states in parts):
            return None
        unknown = torch.full((1, self.columns), torch.nan, dtype=torch.float16)
        return torch.cat(
            [unknown.expand(len(passage.split()), -1) if states is None else states for passage, states in parts]
        )

    def know_any_of(self, texts: Sequence[str]) -> bool:
        return any(self.of(text) is not None for text in texts)

    def _kept(self, text: str) -> Tensor | None:
        if (place := self.places.get(_key(text))) is None:
            return None
        block, start, end = place
        return self.blocks[block][start:end]


def read_states(directory: Path) -> States:
    """What `collect` has left there, read from the files as it is needed; TrainingError where it is not done."""
    info = runs.read_info(directory)
    if info.architecture != runs.STATES:
        raise TrainingError(f"{directory} is a run, and holds no states: python -m training states writes them")
    blocks: list[Tensor] = []
    places: dict[int, tuple[int, int, int]] = {}
    for path in sorted(directory.glob("block-*.safetensors")):
        try:
            block = load_file(path)
            ends = block["words"].cumsum(0).tolist()
            for key, end, words in zip(block["texts"].tolist(), ends, block["words"].tolist(), strict=True):
                places[key] = (len(blocks), end - words, end)
            blocks.append(block["states"])
        except (SafetensorError, KeyError) as error:
            raise TrainingError(f"{path} does not hold states of words: {error}") from error
    if len(places) < info.encoder["texts"]:
        raise TrainingError(
            f"{directory} holds the states of {len(places):,} of {info.encoder['texts']:,} texts: let python -m "
            "training states finish, with the same options"
        )
    return States(info.options["columns"], blocks, places)


def collect(config: StatesConfig) -> Path:
    """Asks the language model about all texts, a block at a time; returns the directory.

    Any number of processes may be at it: each takes the blocks that nobody has. What is there is not asked again.
    """
    dataset = draw_share(load_dataset(config.dataset, config.data_dir), config.train_share, config.seed)
    # Shuffled, so that the first blocks are a sample of all. Each text once, however often it stands there.
    generator = np.random.default_rng(config.seed)
    texts = [str(text) for text in generator.permutation(np.array(list(dict.fromkeys(dataset.train.texts)), object))]
    model = LanguageModel(config)
    directory = config.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(directory / runs.LOCK, timeout=DEADLINE_S):
            _begin(config, dataset, len(texts))
            if not (directory / PROJECTION).exists():
                states, _, _ = model.states(texts[:BLOCK])
                runs.replace(directory / PROJECTION, save(principal_components(states, config.columns)))
    except Timeout as error:
        raise TrainingError(f"{directory}: another process has been at {PROJECTION} for too long") from error
    projection = load_file(directory / PROJECTION)
    blocks = {
        directory / f"block-{start // BLOCK:05}.safetensors": texts[start : start + BLOCK]
        for start in range(0, len(texts), BLOCK)
    }
    # First what nobody is at; then what others have begun, to wait for it, or do it where they have died.
    with tqdm(total=len(blocks), desc="states", unit=f"{BLOCK} texts") as bar:
        for patience in (0.0, DEADLINE_S):
            for path in [path for path in blocks if not path.exists()]:
                bar.update(sum(path.exists() for path in blocks) - bar.n)
                with suppress(Timeout), FileLock(path.with_suffix(".lock"), timeout=patience):
                    if not path.exists():
                        _write_block(path, model, blocks[path], projection)
        bar.update(sum(path.exists() for path in blocks) - bar.n)
    if missing := [path.name for path in blocks if not path.exists()]:
        raise TrainingError(f"{directory}: other processes have been at {', '.join(missing)} for too long")
    for path in blocks:
        path.with_suffix(".lock").unlink(missing_ok=True)
    return directory


def _begin(config: StatesConfig, dataset: Dataset, texts: int) -> None:
    """Writes what the directory is for; TrainingError where it is for something else."""
    options = recorded_options(config) | {"architecture": runs.STATES}
    if Path(config.model).exists():
        options["model"] = Path(config.model).name
    if standing := standing_run(config.output_dir, options, {}):
        check_texts(config.output_dir, standing, dataset)
        return
    name = f"{runs.STATES}-of-{Path(options['model']).name}"
    info = RunInfo(
        task=dataset.task,
        labels=list(dataset.labels),
        architecture=runs.STATES,
        encoder={"texts": texts},
        options=options,
        provenance=provenance(dataset, name, config.seed, ("torch", "transformers")),
    )
    runs.write_info(config.output_dir, info)


def _write_block(path: Path, model: "LanguageModel", texts: Sequence[str], projection: dict[str, Tensor]) -> None:
    meter = Meter()
    states_WD, words_N, meter.tokens = model.states(texts)
    with (path.parent / runs.METRICS).open("a") as file:
        file.write(json.dumps({"block": path.stem, **meter.read()}) + "\n")
    columns_WC = (states_WD.float() - projection["mean"]) @ projection["matrix"]
    content = {
        "texts": torch.tensor([_key(text) for text in texts]),
        "words": torch.tensor(words_N),
        "states": columns_WC.half(),
    }
    runs.replace(path, save(content))


def principal_components(states_WD: Tensor, columns: int) -> dict[str, Tensor]:
    """`mean` (D,) and `matrix` (D, C): states to their first principal components, each of variance one.

    Every dimension counts alike: in a language model some few are hundreds of times as large as the others.
    """
    known_WD = states_WD[~states_WD.isnan().any(1)].double()
    mean_D, spread_D = known_WD.mean(0), known_WD.std(0).clamp(min=1e-6)
    values_D, vectors_DD = torch.linalg.eigh(torch.cov(((known_WD - mean_D) / spread_D).T))
    largest_DC, variance_C = vectors_DD[:, -columns:].flip(1), values_D[-columns:].flip(0).clamp(min=1e-6)
    matrix_DC = largest_DC / variance_C.sqrt() / spread_D[:, None]
    return {"mean": mean_D.float(), "matrix": matrix_DC.float().contiguous()}


class LanguageModel:
    """The lower layers of a causal language model, and its tokenizer."""

    def __init__(self, config: StatesConfig) -> None:
        import transformers  # seconds to import

        path = Path(config.model)
        gguf = path.suffix == ".gguf"
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name} if gguf else {}
        source = source or {"pretrained_model_name_or_path": config.model}
        # No pickled weights.
        how = {"quantization_config": transformers.GgufConfig(dequantize=True)} if gguf else {"use_safetensors": True}
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
            model, loaded = transformers.AutoModel.from_pretrained(
                **source, **how, dtype=torch.float32, output_loading_info=True
            )
            layers = model.layers
            if missing := sorted(loaded["missing_keys"]):  # the library would take random ones
                raise ValueError(f"{len(missing)} weights are missing, as {missing[0]}")
        except (OSError, ValueError, AttributeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TrainingError(
                f"--model {config.model}: no causal language model can be read ({reason}); a hub id, a folder with "
                "config.json, tokenizer.json and model.safetensors, or a .gguf file is needed"
            ) from error
        if config.layer > len(layers):
            raise TrainingError(f"--layer {config.layer}: {config.model} has {len(layers)} layers")
        if config.columns > model.config.hidden_size:
            raise TrainingError(f"--columns {config.columns}: {config.model} is {model.config.hidden_size} wide")
        self.max_tokens, self.width = config.max_tokens, model.config.hidden_size
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        model.layers = layers[: config.layer]
        model.norm = torch.nn.Identity()  # meant for the last layer
        self.model = model.to(self.device, torch.bfloat16).eval()

    @torch.inference_mode()
    def states(self, texts: Sequence[str]) -> tuple[Tensor, list[int], int]:
        """(W, D) bfloat16, all words of all texts in their order, NaN where unknown; words of each text; tokens read.

        The first token is left out: a causal model attends to it where it attends to nothing.
        """
        encoding = self.tokenizer(list(texts), return_offsets_mapping=True, add_special_tokens=False)
        ids = [one[: self.max_tokens] for one in encoding["input_ids"]]
        ends = [
            last_tokens(text, offsets[: self.max_tokens])
            for text, offsets in zip(texts, encoding["offset_mapping"], strict=True)
        ]
        words_N = [len(WORD.findall(text)) for text in texts]
        found = [torch.full((words, self.width), torch.nan, dtype=torch.bfloat16) for words in words_N]
        batches = [batch for batch in sorted_batches([*map(len, ids)], TOKENS_AT_ONCE) if ids[batch[-1]]]
        for batch in tqdm(batches, desc="states", unit="batch", leave=False, delay=5):
            longest = len(ids[batch[-1]])
            # Padded on the right, a causal model needs no mask: nothing looks there.
            ids_BL = torch.tensor([[*ids[index], *[0] * (longest - len(ids[index]))] for index in batch])
            h_BLD = self.model(input_ids=ids_BL.to(self.device), use_cache=False).last_hidden_state.cpu()
            for h_LD, index in zip(h_BLD, batch, strict=True):
                known = {word: token for word, token in ends[index].items() if token > 0}
                found[index][list(known)] = h_LD[list(known.values())]
        return torch.cat(found), words_N, sum(map(len, ids))


def _key(text: str) -> int:
    """A text's name among millions: 64 bits of its digest."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
