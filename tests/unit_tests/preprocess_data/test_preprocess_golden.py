"""Byte identity with Megatron-LM's tools/preprocess_data.py, without Megatron-LM.

The checksums below were taken from the files that NVIDIA/Megatron-LM's tool wrote, at commit
d98e8a64ddf34856e74b24714e3bedb2f5a39553, running on megatron-core 0.19.2, transformers 5.23.0,
tokenizers 0.23.3, sentencepiece 0.2.3 and nltk 3.10.4, for the corpus and tokenizers of
conftest.py:

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix out TOKENIZER OPTIONS \\
        --workers 2

(--workers 6 with --partitions; run twice with --split-sentences and one partition, since its first
run only splits; nltk's data in ~/nltk_data.)
"""

import hashlib
from pathlib import Path

import pytest
from conftest import documents, write_lines

# tokenizer, options, what follows the prefix in the file names -> sha256 of .bin and of .idx
GOLDEN = [
    (
        "null",
        "--json-keys ids",
        {
            "ids_document": (
                "537b2b36455a2e5559edb1a215044a0a275f43e2c729859dc0631e0fd162cf20",
                "7446818c22abb72fed3ae937a2927f4a55861d99ece0f289fc5435f331a44451",
            ),
        },
    ),
    (
        "null",
        "--json-keys ids --append-eod",
        {
            "ids_document": (
                "8fe8bf74a5d8efc5b81bd58c5e611cddc9262a6428ba342fb5f7f367f9113f4f",
                "27d48fbefc15409ed585ef4c6ac0bf3720eca5aa3f6fdef8df79f66aae07d468",
            ),
        },
    ),
    (
        "hf",
        "",
        {
            "text_document": (
                "bccbf1680b109d997bd98b226c218e7e88573d243372485a0da60263268eaaec",
                "c6ed070113bd901f353a3b81fd2f2b37cffc979297f073c73b0091c6454be281",
            ),
        },
    ),
    (
        "hf",
        "--append-eod",
        {
            "text_document": (
                "d37be1f763231744a8ae214059c44e0f0137db06a555c078da7cfd7d363b51bd",
                "8bef482f14b2daa12bd5cd83638d05a22f0724e18ab9943c654de9b42daf56d9",
            ),
        },
    ),
    (
        "hf_bos",
        "--append-eod",
        {
            "text_document": (
                "3ff1b9c71b1475163bd62faa891ee6059c37abad5b0bcf0ecab62b5c034dc13f",
                "bddd0bf53ea79de168bee2f2a03de96e4ed73a6366c04b2767bc3a448767fcc8",
            ),
        },
    ),
    (
        "sp",
        "",
        {
            "text_document": (
                "09f2952d882348c86342729f79d47864fb33a5bcb7d9b64bca02c4464a9cb214",
                "df9a010d152a35e6d62eb08cee66cd7608c844c29ced76ae431c13efa074fea4",
            ),
        },
    ),
    (
        "sp",
        "--append-eod",
        {
            "text_document": (
                "76db0c35d444f6320c9b8d4cf9b2e3236421e8851bb939cdd5893d30ad335755",
                "07ec337180829878d3238af730d43da97ffa8f26641ec7d40c4bbfcf8c4fd2f0",
            ),
        },
    ),
    (
        "hf",
        "--json-keys text title --append-eod",
        {
            "text_document": (
                "d37be1f763231744a8ae214059c44e0f0137db06a555c078da7cfd7d363b51bd",
                "8bef482f14b2daa12bd5cd83638d05a22f0724e18ab9943c654de9b42daf56d9",
            ),
            "title_document": (
                "f145581da964088a200523e1bd00e8de5cd335cd3d164256b96b6bc71e092356",
                "2469a0f56f012eb32f43c2bc8603ecc2809c921bb485cee279019fb99bcc5a85",
            ),
        },
    ),
    (
        "hf",
        "--split-sentences",
        {
            "text_sentence": (
                "f7163d71ebabb44032fa1d0b38cd2cd25149d2e1807ff3b9fab567e19cb0394a",
                "69c91abb9bfc17327c5210d6c2c1fc1769a4a387467a543be657bacaaad3d718",
            ),
        },
    ),
    (
        "hf",
        "--split-sentences --keep-newlines --append-eod",
        {
            "text_sentence": (
                "b4274c7345ad5d55408d38c938a92175d23adad4a343f39a4269bf8407aa5de2",
                "1504f13631ba9ff271d62a867035908c0351cff164b4e16f633fa48908d7ece2",
            ),
        },
    ),
    (
        "sp",
        "--split-sentences --append-eod",
        {
            "text_sentence": (
                "76db0c35d444f6320c9b8d4cf9b2e3236421e8851bb939cdd5893d30ad335755",
                "0aa9394de2daf985e8204ce446a54625caad9323c540e884ae85d735ffd9d2a0",
            ),
        },
    ),
    (
        "hf",
        "--append-eod --partitions 3",
        {
            "text_document": (
                "cea039d9f4d4cb340d9eea927217382d7d8881aea0922190de36e99b00e5a067",
                "377fabc6b3666019bfb331bf55df460a179183aa62941fda6b14d6f1316a2d15",
            ),
        },
    ),
    (
        "hf",
        "--append-eod --partitions 3 --keep-sequential-samples",
        {
            "text_document": (
                "d37be1f763231744a8ae214059c44e0f0137db06a555c078da7cfd7d363b51bd",
                "8bef482f14b2daa12bd5cd83638d05a22f0724e18ab9943c654de9b42daf56d9",
            ),
        },
    ),
    (
        "hf",
        "--split-sentences --partitions 2",
        {
            "text_sentence": (
                "8c5411df587f63c4b25debf8127c4f8a20001a78ce94d950a08b6b9c02e08385",
                "3d4265585b270d906da8f7c5dc9415fda77133d117d60cd4786b12f39c8d1123",
            ),
        },
    ),
]


@pytest.mark.parametrize(("tokenizer", "options", "files"), GOLDEN)
def test_same_bytes_as_megatron_lm(
    tool, tmp_path: Path, tokenizers, punkt_data: Path, monkeypatch, tokenizer, options, files
):
    monkeypatch.setenv("NLTK_DATA", str(punkt_data))
    corpus = write_lines(tmp_path / "corpus.jsonl", documents())
    prefix = tmp_path / "out"
    outcome = tool(
        "--input", corpus, "--output-prefix", prefix, "--workers", 2,
        *tokenizers[tokenizer], *options.split(),
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    for name, (bin_sha256, idx_sha256) in files.items():
        assert sha256(tmp_path / f"out_{name}.bin") == bin_sha256
        assert sha256(tmp_path / f"out_{name}.idx") == idx_sha256


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
