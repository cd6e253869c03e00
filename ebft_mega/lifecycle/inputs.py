"""What a run reads: training batches, held-out rows, and the tokenizer where texts are looked at."""

from ebft_mega.config.entries import keys_that_need
from ebft_mega.config.schema import RunConfig
from ebft_mega.data.rows.loader import BatchLoader, fixed_rows
from ebft_mega.data.rows.row_ranges import RowRanges
from ebft_mega.data.tokenizers.tokenizer import load_tokenizer
from ebft_mega.evaluation.held_out import EvaluationSettings
from ebft_mega.parallel.groups import ProcessGroups
from ebft_mega.planning.datasets import open_place, open_training_rows
from ebft_mega.reward.sampled_blocks import Decode
from ebft_mega.train.hooks import HeldOut
from ebft_mega.train.loop import rows_of_step


def make_loader(config: RunConfig, groups: ProcessGroups, is_trace: bool) -> BatchLoader:
    """This replica's batches, from the first row of the run on.

    Args:
        is_trace: only one batch will be read, by this process, and all of it has to be whole.
    Raises:
        InputError: a dataset cannot be opened or does not fit the others.
    """
    return BatchLoader(
        open_training_rows(config),
        config.train.global_batch_size,
        groups.data_parallel_rank,
        groups.data_parallel_size,
        workers=0 if is_trace else config.data.workers,
        pin_memory=groups.device.type == "cuda",
        on_error="raise" if is_trace else config.data.on_error,
        left_out=RowRanges(config.data.skip_rows),
    )


def text_decoder(config: RunConfig, loader: BatchLoader) -> Decode | None:
    """How token ids become text, by the data's tokenizer; None: no entry of the configuration declares texts.

    Raises:
        InputError: the tokenizer cannot be loaded.
    Communication: none.
    """
    if not keys_that_need(config, "texts"):
        return None
    dataset = loader.stream.sources[0].dataset  # of all sources: a mixture that disagrees is refused
    return load_tokenizer(dataset.tokenizer_directory, str(dataset.manifest.eos_id)).decode


def held_out_rows(config: RunConfig, groups: ProcessGroups) -> HeldOut | None:
    """This replica's held-out rows, on its device; None: the configuration names none.

    Raises:
        InputError: the dataset cannot be opened.
    Communication: none.
    """
    if config.evaluation.shards is None:
        return None
    dataset = open_place(config, "evaluation.shards", config.evaluation.shards)
    rows = fixed_rows(
        dataset,
        config.data.sequence_length,
        config.evaluation.rows,
        groups.data_parallel_rank,
        groups.data_parallel_size,
    )
    dataset.close()
    rows = rows.filled_up(-(-config.evaluation.rows // groups.data_parallel_size))
    rows = rows_of_step(rows, config, groups.device)
    return HeldOut(rows, EvaluationSettings.of(config), config.evaluation.interval, config.evaluation.rows)
