"""From text to Megatron's indexed datasets: the parts behind tools/preprocess_data.py.

In the order in which a document meets them: `corpus` (files to lines; `packed`, `parquet`),
`host_tokenizer` (options to a tokenizer), `kept_tokenizer` (the same without Megatron),
`gigatoken_bpe` (its fast equal; `proof` that it is equal),
`encoding` (lines to token ids), `worker_pool` (that, on every core, in order), `job` (encoded lines
to datasets), `dataset_writer` (token ids to files that appear only when whole, in a `work_folder`),
`dataset_reader` (those files as they are).
"""


class DataError(ValueError):
    """The user's files or options are wrong; the message is one line and says what to do."""
