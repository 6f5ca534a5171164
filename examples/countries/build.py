"""Real facts for a real language model: a small corpus of countries, and questions of one and two hops about them.

The facts are those of the `countryinfo` package (`pip install countryinfo`); they are not verified. Each country has
three passages: its geography, its people, its codes. A question asks for one fact of one country; a two-hop question
names the country only by its capital, which only the geography passage has. The countries of `train`, `dev` and
`evaluation` are disjoint, so no fact is in two of them. Choose prompts and settings on `dev`. No question asks about
the countries in the examples of `smollm2.yaml`'s prompts.

    python examples/countries/build.py --out countries
    searche1-lite train --config examples/countries/smollm2.yaml model.name=FOLDER --out runs/countries

`FOLDER` is SmolLM2-135M-Instruct as saved by transformers (`HuggingFaceTB/SmolLM2-135M-Instruct` on the hub). The
config names the files as `countries/...`, relative to where the command is run.
"""

import argparse
import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from countryinfo import CountryInfo, all_countries

SHARES = {"train": 0.6, "dev": 0.15, "evaluation": 0.25}
"""Of the countries; the questions follow them."""

SHOWN = frozenset({"Japan", "Kenya"})
"""Countries of the prompts' examples."""

LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "it": "Italian",
    "pt": "Portuguese", "ru": "Russian", "zh": "Chinese",
}  # fmt: skip
"""Names of the languages that several countries share; the others are left out."""


@dataclass(frozen=True, slots=True)
class Country:
    """The facts of one country; no field is empty."""

    name: str
    names: tuple[str, ...]
    """Other names that count as correct."""
    code: str
    capital: str
    region: str
    currency: str
    calling_code: str
    domain: str
    demonym: str
    population: int
    area: int
    borders: tuple[str, ...]
    languages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A fact to ask for: the question, the passage that has it, and the correct answers."""

    name: str
    passage: str
    question: str
    answers: Callable[[Country], list[str]]


RELATIONS = (
    Relation("capital", "geography", "What is the capital of {}?", lambda c: _spellings(c.capital)),
    Relation("population", "people", "How many people live in {}?", lambda c: [f"{c.population:,}"]),
    Relation("demonym", "people", "What is a person from {} called?", lambda c: [c.demonym, f"{c.demonym}s"]),
    Relation("currency", "codes", "What is the currency code of {}?", lambda c: [c.currency]),
    Relation("calling_code", "codes", "What is the calling code of {}?", lambda c: [c.calling_code]),
)
COUNTRY_OF = "Which country has the capital {}?"
"""The way back, of one hop; other questions of two hops start with it."""
BY_CAPITAL = "the country whose capital is {}"


def _spellings(name: str) -> list[str]:
    """`name`, and the same without accents where it has any."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return list(dict.fromkeys([name, plain]))


def load_countries() -> list[Country]:
    """Countries of which every fact is known, by name; small territories are left out."""
    codes = {country.iso(3) for country in all_countries()} - {""}
    known = {code: CountryInfo(code).info() for code in sorted(codes)}  # one record a code: Myanmar, not Burma as well
    return sorted((c for r in known.values() if (c := _country(r, known)) is not None), key=lambda c: c.name)


def _country(record: dict[str, Any], known: dict[str, dict[str, Any]]) -> Country | None:
    single = ("capital", "demonym", "area", "population")
    several = ("currencies", "callingCodes", "tld", "languages")
    region = record.get("intermediateregion") or record.get("subregion")
    if not region or not all(record.get(key) for key in (*single, *several)):
        return None
    name, capital = record["name"], record["capital"]
    if record["population"] < 200_000 or not isinstance(capital, str) or len(record["currencies"]) > 1:
        return None
    if capital in name or name in capital or "," in record["demonym"] or len(record["callingCodes"]) > 1:
        return None  # a question that answers itself, or one with more than one right answer
    longer = [spelling.strip() for spelling in record["altSpellings"] if len(spelling.strip()) > 3]
    names = dict.fromkeys(spelling for one in (name.removeprefix("The "), *longer) for spelling in _spellings(one))
    borders = tuple(known[code]["name"] for code in record.get("borders", []) if code in known)
    return Country(
        name=name,
        names=tuple(names),
        code=record["ISO"]["alpha3"],
        capital=capital,
        region=region,
        currency=record["currencies"][0],
        calling_code=record["callingCodes"][0],
        domain=record["tld"][0],
        demonym=record["demonym"],
        population=int(record["population"]),
        area=int(record["area"]),
        borders=borders,
        languages=tuple(LANGUAGES[code] for code in record["languages"] if code in LANGUAGES),
    )


def passages(country: Country) -> dict[str, dict[str, str]]:
    """The three passages of a country, each as a row of the corpus (`id`, `contents`: the title, then the text)."""
    name, start = country.name, country.name[:1].upper() + country.name[1:]
    borders = f" It borders {', '.join(country.borders[:4])}." if country.borders else " It has no land borders."
    languages = f" They speak {' and '.join(country.languages[:2])}." if country.languages else ""
    texts = {
        "geography": f"The capital of {name} is {country.capital}. {start} lies in {country.region} and covers "
        f"{country.area:,} square kilometres.{borders}",
        "people": f"{country.population:,} people live in {name}. A person from {name} is called {country.demonym}."
        f"{languages}",
        "codes": f"The currency code of {name} is {country.currency}. The calling code is {country.calling_code}. The "
        f"internet domain is {country.domain}.",
    }
    return {
        kind: {"id": f"{country.code}-{kind}", "contents": f"{name}: {kind}\n{text}"} for kind, text in texts.items()
    }


def questions(country: Country) -> list[dict[str, Any]]:
    """Every question about a country, with the passages it needs, in the order in which they must be found."""
    rows = [_row(country, "country", COUNTRY_OF.format(country.capital), [country.name, *country.names], ["geography"])]
    for relation in RELATIONS:
        answers = relation.answers(country)
        rows.append(_row(country, relation.name, relation.question.format(country.name), answers, [relation.passage]))
        if relation.passage != "geography":
            asked = relation.question.format(BY_CAPITAL.format(country.capital))
            rows.append(_row(country, relation.name, asked, answers, ["geography", relation.passage]))
    return rows


def _row(country: Country, relation: str, question: str, answers: list[str], needed: list[str]) -> dict[str, Any]:
    return {
        "id": f"{country.code}-{relation}-{len(needed)}",
        "question": question,
        "golden_answers": list(dict.fromkeys(answers)),
        "metadata": {"hops": len(needed), "passages": [f"{country.code}-{kind}" for kind in needed]},
    }


def build(seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """`corpus`, `train`, `dev` and `evaluation`, each a list of rows; the seed decides on the split and the order."""
    countries = load_countries()
    rng = Random(seed)
    asked = [country for country in countries if country.name not in SHOWN]
    rng.shuffle(asked)
    built = {"corpus": [row for country in countries for row in passages(country).values()]}
    first = 0
    for index, (split, share) in enumerate(SHARES.items()):
        last = len(asked) if index == len(SHARES) - 1 else first + round(share * len(asked))
        rows = [row for country in asked[first:last] for row in questions(country)]
        rng.shuffle(rows)
        built[split], first = rows, last
    return built


def write(out: Path, seed: int = 0) -> dict[str, int]:
    """Writes `corpus.jsonl` and a file of questions a split; returns the number of rows in each."""
    out.mkdir(parents=True, exist_ok=True)
    built = build(seed)
    for name, rows in built.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: len(rows) for name, rows in built.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("countries"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, rows in write(arguments.out, arguments.seed).items():
        print(f"{arguments.out / name}.jsonl: {rows}")


if __name__ == "__main__":
    main()
