"""Make examples/assets/kjv.txt.xz: the King James Bible as plain text, from two packages of Debian.

    apt-get install bible-kjv bible-kjv-text
    python examples/prepare_text.py

One chapter is a heading ("Genesis 1"), an empty line, and one line per verse ("1 In the beginning ..."); two empty
lines separate chapters. The same packages give the same file byte for byte.
"""

from __future__ import annotations

import lzma
import re
import subprocess
from pathlib import Path

TARGET = Path(__file__).parent / "assets" / "kjv.txt.xz"
VERSES = 31_102
# In the order of the text; the program itself prints abbreviations ("Ge1:1").
BOOKS = """Genesis|Exodus|Leviticus|Numbers|Deuteronomy|Joshua|Judges|Ruth|1 Samuel|2 Samuel|1 Kings|2 Kings
1 Chronicles|2 Chronicles|Ezra|Nehemiah|Esther|Job|Psalm|Proverbs|Ecclesiastes|Song of Solomon|Isaiah|Jeremiah
Lamentations|Ezekiel|Daniel|Hosea|Joel|Amos|Obadiah|Jonah|Micah|Nahum|Habakkuk|Zephaniah|Haggai|Zechariah|Malachi
Matthew|Mark|Luke|John|Acts|Romans|1 Corinthians|2 Corinthians|Galatians|Ephesians|Philippians|Colossians
1 Thessalonians|2 Thessalonians|1 Timothy|2 Timothy|Titus|Philemon|Hebrews|James|1 Peter|2 Peter|1 John|2 John
3 John|Jude|Revelation""".replace("\n", "|").split("|")


def format_text(raw: str) -> str:
    """Chapters with headings, from lines such as "Ge1:1 In the beginning God created the heaven and the earth."."""
    chapters: dict[tuple[str, int], list[str]] = {}
    abbreviations: list[str] = []
    for line in raw.splitlines():
        match = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):(\d+) (.+)", line)
        if match is None:
            raise ValueError(f"not a verse: {line!r}; expected a line such as 'Ge1:1 In the beginning'")
        abbreviation, chapter, verse, words = match.groups()
        if abbreviation not in abbreviations:
            abbreviations.append(abbreviation)
        book = BOOKS[abbreviations.index(abbreviation)]
        chapters.setdefault((book, int(chapter)), []).append(f"{verse} {words.strip()}")
    verses = sum(map(len, chapters.values()))
    if verses != VERSES or len(abbreviations) != len(BOOKS):
        raise ValueError(f"found {verses} verses in {len(abbreviations)} books; there are {VERSES} in {len(BOOKS)}")
    blocks = [f"{book} {chapter}\n\n" + "\n".join(lines) for (book, chapter), lines in chapters.items()]
    return "\n\n\n".join(blocks) + "\n"


def main() -> None:
    raw = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True).stdout
    text = format_text(raw)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_bytes(lzma.compress(text.encode("ascii"), preset=9 | lzma.PRESET_EXTREME))
    print(f"{TARGET}: {len(text):,} characters, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
