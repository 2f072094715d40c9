"""Where a sentence ends: nltk's Punkt splitter, cutting as Megatron-LM's tool does."""

import importlib.util
from collections.abc import Callable

from megatron_scmoe.commands.preprocess import DataError

# Punkt sees a text in pieces of this many characters; Megatron-LM's choice, kept because a piece's
# end is a sentence's end.
PIECE_CHARS = 1_000_000

# Punkt's pattern of a possible sentence end, except that the white space after the sentence belongs
# to the match and so to the sentence. The match also takes in the word before the end.
_KEEP_SPACE = r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"


def check_nltk() -> None:
    """Look for nltk without importing it.

    Raises:
        DataError: it is not installed.
    """
    if importlib.util.find_spec("nltk") is None:
        raise DataError("--split-sentences needs nltk: pip install 'megatron-scmoe[data]'")


def load_splitter(lang: str, keep_newlines: bool) -> Callable[[str], list[str]]:
    """Make a function from a text to its sentences; downloads nothing.

    Args:
        lang: name of a model in nltk's punkt_tab data, such as english.
        keep_newlines: leave the white space between two sentences at the end of the first.

    Raises:
        DataError: nltk or its data is missing.
    """
    check_nltk()
    from nltk.tokenize import punkt

    try:
        splitter = punkt.PunktTokenizer(lang)
    except (LookupError, ValueError, OSError) as error:
        raise DataError(
            f"--split-sentences: nltk has no punkt_tab data for --lang {lang}; run "
            "python -c \"import nltk; nltk.download('punkt_tab')\" "
            "or set NLTK_DATA to the folder that has tokenizers/punkt_tab"
        ) from error
    if keep_newlines:

        class KeepSpace(punkt.PunktLanguageVars):
            _period_context_fmt = _KEEP_SPACE

        splitter = punkt.PunktSentenceTokenizer(splitter._params, lang_vars=KeepSpace())

    def split(text: str) -> list[str]:
        sentences: list[str] = []
        for start in range(0, len(text), PIECE_CHARS):
            sentences += splitter.tokenize(text[start : start + PIECE_CHARS])
        return sentences

    return split
