"""Sources: small copies of each format, every option, every fault; then the real files, where they are at hand."""

from __future__ import annotations

import gzip
import json
import time
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from funnelrec.core.schema import Category, Number, Schema, Text
from funnelrec.data import download
from funnelrec.data.ingest import BadRowsError
from funnelrec.data.sources import _files, criteo, csv, frappe, movielens, sessions

ML_1M = {
    "ratings.dat": "1::7::5::978300760\n2::7::3::978300761\n2::9::1::978300762\n",
    "users.dat": "1::F::1::10::02139\n2::M::56::16::70072-1234\n",
    "movies.dat": '7::Misérables, Les (1995)::Drama|Musical\n9::"Quoted" (A) (1999)::Comedy\n11::Nameless::War\n',
}
ML_100K = {
    "u.data": "196\t242\t3\t881250949\n186\t302\t4\t891717742\n",
    "u.user": "186|24|M|technician|85711\n196|53|F|other|T8H1N\n",
    "u.item": "242|Kolya (1996)|24-Jan-1997||http://x/|" + "|".join(["0"] * 5 + ["1"] + ["0"] * 13) + "\n"
    "302|unknown||||" + "|".join(["1"] + ["0"] * 17 + ["1"]) + "\n",
}


def folder_of(tmp_path: Path, files: dict[str, str], encoding: str = "latin-1") -> Path:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
    return tmp_path


def test_movielens_1m(tmp_path: Path) -> None:
    tables = movielens.load(folder_of(tmp_path, ML_1M))
    assert tables.name == "movielens-1m"
    assert tables.events.rows() == [(1, 7, 5.0, 978300760), (2, 7, 3.0, 978300761), (2, 9, 1.0, 978300762)]
    assert tables.users is not None
    assert tables.users.rows() == [(1, "F", 1, "10", "02139"), (2, "M", 56, "16", "70072-1234")]
    assert tables.items is not None
    assert tables.items.rows() == [
        (7, "Misérables, Les", 1995.0, ["Drama", "Musical"]),
        (9, '"Quoted" (A)', 1999.0, ["Comedy"]),
        (11, "Nameless", None, ["War"]),
    ]
    assert tables.schema == Schema(
        user="user",
        item="item",
        time="time",
        label="rating",
        positive=0.5,
        click=4,
        users=(Category("gender"), Category("age"), Category("occupation"), Category("zip")),
        items=(Text("title"), Number("year"), Category("genres", many=True)),
    )
    assert [a.read for a in tables.accounting] == [3, 2, 3]


def test_movielens_100k(tmp_path: Path) -> None:
    tables = movielens.load(folder_of(tmp_path, ML_100K), variant="100k", positive=4)
    assert tables.events.rows() == [(196, 242, 3.0, 881250949), (186, 302, 4.0, 891717742)]
    assert tables.users is not None
    assert tables.users.rows() == [(186, 24.0, "M", "technician", "85711"), (196, 53.0, "F", "other", "T8H1N")]
    assert tables.items is not None
    assert tables.items.rows() == [
        (242, "Kolya", 1996.0, ["Comedy"]),
        (302, "unknown", None, ["unknown", "Western"]),
    ]
    assert tables.schema.positive == 4.0
    assert Number("age") in tables.schema.users


def test_movielens_other_name_and_gzip(tmp_path: Path) -> None:
    files = dict(ML_1M)
    packed = gzip.compress(files.pop("ratings.dat").encode())
    folder_of(tmp_path, files)
    (tmp_path / "ratings_5core.dat.gz").write_bytes(packed)
    tables = movielens.load(tmp_path)
    assert tables.accounting[0].file == "ratings_5core.dat"
    assert tables.events.height == 3


def test_movielens_is_read_inside_the_archive_and_fetched_when_no_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, text in ML_1M.items():
            file.writestr(f"ml-1m/{name}", text.encode("latin-1"))
    before = sorted(tmp_path.iterdir())
    tables = movielens.load(archive)
    assert tables.events.height == 3
    assert sorted(tmp_path.iterdir()) == before  # nothing was extracted

    asked: list[tuple[object, ...]] = []

    def given(*args: object) -> Path:
        asked.append(args)
        return archive

    monkeypatch.setenv("FUNNELREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(movielens, "fetch", given)
    assert movielens.load().events.equals(tables.events)
    url, folder, sha256, size = asked[0]
    assert str(url).startswith("https://files.grouplens.org/")
    assert folder == tmp_path / "cache"
    assert (len(str(sha256)), size) == (64, 5_917_549)


def test_a_damaged_or_huge_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("ml-1m/ratings.dat", "1::7::5::978300760\n" * 1000)
    with pytest.raises(ValueError, match=r"holds no users\.dat; pass the archive that does"):
        movielens.load(archive)
    with monkeypatch.context() as limited, pytest.raises(ValueError, match="is larger than 1,000 bytes"):
        limited.setattr(_files, "LARGEST_FILE", 1000)
        movielens.load(archive)
    data = bytearray(archive.read_bytes())
    data[60] ^= 1
    archive.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="is damaged"):
        movielens.load(archive)


def test_movielens_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="variant must be one of 1m, 100k, received '20m'"):
        movielens.load(tmp_path, variant="20m")
    with pytest.raises(ValueError, match=r"holds no ratings\.dat or ratings_5core\.dat"):
        movielens.load(tmp_path)
    with pytest.raises(ValueError, match="is not there; pass the folder or the archive"):
        movielens.load(tmp_path / "gone")
    bad = {**ML_1M, "ratings.dat": ML_1M["ratings.dat"] + "2::9::x::978300762\n2::9\n"}
    with pytest.raises(BadRowsError, match=r"^ratings\.dat:4: column 'rating': 'x' is no number \(2 of 5 rows"):
        movielens.load(folder_of(tmp_path, bad))
    tables = movielens.load(tmp_path, max_bad_rows=2)
    assert [(r.line, r.column) for r in tables.accounting[0].rejects] == [(4, "rating"), (5, "rating")]
    twice = {**ML_1M, "users.dat": ML_1M["users.dat"] * 2}
    with pytest.raises(BadRowsError, match=r"users\.dat:3: column 'user': an earlier row has the same value"):
        movielens.load(folder_of(tmp_path, twice))


FRAPPE = "{} 451:1 4149:1 5041:1 5046:1 5053:1 5055:1 5058:1 5060:1 5069:1 5149:1\n"


def test_frappe(tmp_path: Path) -> None:
    (tmp_path / "frappe.train.REBUILT.libfm").write_text(FRAPPE.format(1) + FRAPPE.format(-1))
    (tmp_path / "frappe.validation.libfm").write_text(FRAPPE.format(-1).replace("\n", "\r\n"))
    (tmp_path / "frappe.test.libfm").write_text(FRAPPE.format(1).rstrip())
    tables = frappe.load(tmp_path)
    features = (451, 4149, 5041, 5046, 5053, 5055, 5058, 5060, 5069, 5149)
    assert tables.events.rows() == [(1.0, *features), (0.0, *features), (0.0, *features), (1.0, *features)]
    assert tables.part is not None
    assert tables.part.tolist() == [0, 0, 1, 2]
    assert tables.schema.is_rows
    assert len(tables.schema.context) == 10
    (tmp_path / "frappe.test.libfm").write_text(FRAPPE.format(1).replace("5041:1", "5041:0.5"))
    with pytest.raises(ValueError, match="'daytime' holds something else than 'feature:1'"):
        frappe.load(tmp_path)
    (tmp_path / "frappe.test.libfm").write_text(FRAPPE.format(1).replace(" 5041:1", ""))
    with pytest.raises(BadRowsError, match=r"frappe\.test\.libfm:1: column 'city': 10 columns where 11 are due"):
        frappe.load(tmp_path)
    with pytest.raises(ValueError, match="frappe is not downloaded; pass the folder"):
        frappe.load()


def test_criteo(tmp_path: Path) -> None:
    row = ["1", "", "-1", *["5"] * 11, "00000012", "", *["68fd1e64"] * 24]
    path = tmp_path / "train.txt"
    path.write_text("\t".join(row) + "\n" + "\t".join(["0", *row[1:-1], ""]) + "\n")
    for place in (path, tmp_path):
        tables = criteo.load(place, numbers="quantile", min_count=10)
        assert tables.events.row(0)[:4] == (1.0, None, -1.0, 5.0)
        assert tables.events["C1"].to_list() == ["00000012"] * 2
        assert tables.events["C26"].to_list() == ["68fd1e64", None]
        assert tables.schema.context[0] == Number("I1", "quantile")
        assert tables.schema.context[-1] == Category("C26", min_count=10)
        assert tables.schema.time is None
    path.write_text("\t".join(row[1:]) + "\n")
    with pytest.raises(BadRowsError, match=r"train\.txt:1: column 'C26': 39 columns where 40 are due"):
        criteo.load(path)
    with pytest.raises(ValueError, match="numbers must be 'log' or 'quantile', received 'raw'"):
        criteo.load(path, numbers="raw")
    with pytest.raises(ValueError, match=r"criteo is not downloaded; pass the path of its train\.txt"):
        criteo.load()


SCHEMA = Schema(
    user="user",
    item="item",
    time="when",
    label="rating",
    context=(Category("device"), Number("price")),
    items=(Text("title"), Category("genres", many=True)),
)


def own_tables(tmp_path: Path) -> tuple[Path, Path]:
    events, items = tmp_path / "events.csv", tmp_path / "items.csv"
    events.write_text("user,item,when,rating,device,price\n1,7,2024-01-01,5,web,1.5\n2,8,2024-01-02,3,,\n")
    items.write_text('item,title,genres\n7,Heat,Crime|Drama\n8,"Big, \n""really""",\nx9,Up,A\n')
    return events, items


def test_csv_with_a_schema(tmp_path: Path) -> None:
    events, items = own_tables(tmp_path)
    saved = tmp_path / "schema.json"
    saved.write_text(json.dumps(SCHEMA.to_dict()))
    for schema in (SCHEMA, saved, str(saved)):
        tables = csv.load(events, items=items, schema=schema)
        assert tables.schema == SCHEMA
        # x9 makes the ids of the catalogue text, so those of the events are text too.
        assert tables.events.rows() == [
            (1, "7", 1704067200, 5.0, "web", 1.5),
            (2, "8", 1704153600, 3.0, None, None),
        ]
        assert tables.items is not None
        assert tables.items.rows() == [
            ("7", "Heat", ["Crime", "Drama"]),
            ("8", 'Big, \n"really"', None),
            ("x9", "Up", ["A"]),
        ]
        assert [(a.file, a.read) for a in tables.accounting] == [("events.csv", 2), ("items.csv", 3)]


def test_csv_without_a_schema_guesses_the_same_meaning_and_rejects_the_same_rows(tmp_path: Path) -> None:
    rows = "".join(
        f"{u},{100 + i},{978300760 + i},{1 + i % 5},{'web' if i % 2 else 'app'}\n" for i in range(30) for u in (1, 2)
    )
    path = tmp_path / "events.csv"
    path.write_text("userId,movieId,timestamp,rating,device\n" + rows + "3,100,978300760,NaN,web\n")
    with pytest.raises(BadRowsError, match=r"events\.csv:62: column 'rating': the value is NaN"):
        csv.load(path)
    tables = csv.load(path, max_bad_rows=1)
    assert tables.schema == Schema(
        user="userId", item="movieId", time="timestamp", label="rating", click=4, context=(Category("device"),)
    )
    assert tables.events.height == 60
    frame = csv.load(pl.read_csv(path).head(60))
    assert frame.events.equals(tables.events)


def test_csv_refusals(tmp_path: Path) -> None:
    events, items = own_tables(tmp_path)
    with pytest.raises(ValueError, match=r"there is no schema file .*s\.json; check the path"):
        csv.load(events, schema=tmp_path / "s.json")
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(ValueError, match=r"s\.json is no JSON"):
        csv.load(events, schema=tmp_path / "s.json")
    (tmp_path / "s.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold one JSON object, received a list"):
        csv.load(events, schema=tmp_path / "s.json")
    with pytest.raises(ValueError, match="a table of items needs a schema that names 'user' and 'item'"):
        csv.load(events, items=items, schema=Schema(label="rating"))
    with pytest.raises(ValueError, match="the schema names the field 'title' of items, but there is no items table"):
        csv.load(events, schema=SCHEMA)
    with pytest.raises(ValueError, match=r"events\.csv has no column 'stars'; it has user, item"):
        csv.load(events, schema=Schema(label="stars"))


# --- the real files ---------------------------------------------------------------------------------------------------


def test_real_movielens_1m(real_data: Path) -> None:
    start = time.perf_counter()
    tables = movielens.load(real_data / "ml-1m")
    seconds = time.perf_counter() - start
    assert tables.events.height == 999_611
    assert tables.events["user"].n_unique() == 6_040
    assert tables.events["item"].n_unique() == 3_416
    assert tables.items is not None
    assert tables.users is not None
    assert (tables.items.height, tables.users.height) == (3_883, 6_040)
    assert tables.items["year"].null_count() == 0
    assert tables.items.filter(pl.col("item") == 73)["title"].to_list() == ["Misérables, Les"]
    assert tables.items["genres"].explode().n_unique() == 18
    assert (tables.events["time"].min(), tables.events["time"].max()) == (956703932, 1046454590)
    assert seconds < 30  # 1 s alone on two cores


def test_real_movielens_100k(real_data: Path) -> None:
    tables = movielens.load(real_data / "ml-100k", variant="100k")
    assert tables.events.height == 100_000
    assert tables.items is not None
    assert (tables.items.height, tables.items["genres"].explode().n_unique()) == (1_682, 19)
    assert tables.items["genres"].list.len().min() == 1


def test_real_frappe(real_data: Path) -> None:
    tables = frappe.load(real_data / "frappe")
    assert tables.part is not None
    assert np.bincount(tables.part).tolist() == [202_005, 57_722, 28_860]
    positives = [int(tables.events["label"].filter(pl.Series(tables.part == p)).sum()) for p in range(3)]
    assert positives == [67_598, 19_063, 9_536]
    assert (tables.events["item"].min(), tables.events["item"].max()) == (957, 5038)


def test_real_criteo(real_data: Path) -> None:
    tables = criteo.load(real_data / "criteo-10k" / "criteo_first10000_train.txt.gz")
    assert tables.events.height == 10_000
    assert tables.events["label"].sum() == 2_182


def test_yoochoose_sessions(tmp_path: Path) -> None:
    (tmp_path / "yoochoose-clicks-100k_train_full.txt").write_text("SessionId\tItemId\tTime\n3\t8\t10.9\n3\t9\t10.1\n")
    (tmp_path / "yoochoose-clicks-100k_test.txt").write_text("SessionId\tItemId\tTime\n3\t9\t20.0\n")
    tables = sessions.load(tmp_path)
    assert tables.events.rows() == [(3, 9, 10), (3, 8, 10), (7, 9, 20)]  # the test's session 3 is another one
    assert tables.part is not None and tables.part.tolist() == [0, 0, 2]
    (tmp_path / "yoochoose-clicks-100k_test.txt").write_text("SessionId\tItemId\tTime\nx\t9\t20.0\n")
    with pytest.raises(ValueError, match=r"yoochoose-clicks-100k_test.txt is not a table of SessionId, ItemId, Time"):
        sessions.load(tmp_path)


def test_diginetica_sessions_are_put_together_from_their_prefixes(tmp_path: Path) -> None:
    (tmp_path / "train_sessions.txt").write_text("5 6\n7 8 9\n")
    (tmp_path / "test_prefix_target.txt").write_text("5 6 7\t9\n5 6\t7\n5\t6\n5\t8\n")
    tables = sessions.load(tmp_path, variant="diginetica")
    assert tables.events["item"].to_list() == [5, 6, 7, 8, 9, 5, 6, 7, 9, 5, 8]
    assert tables.events["session"].to_list() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    (tmp_path / "train_sessions.txt").write_text("5 x\n")
    with pytest.raises(ValueError, match=r"train_sessions.txt must hold item numbers alone"):
        sessions.load(tmp_path, variant="diginetica")
    with pytest.raises(ValueError, match="variant must be one of yoochoose, diginetica, received 'tmall'"):
        sessions.load(tmp_path, variant="tmall")


def test_real_sessions(real_data: Path) -> None:
    clicks = sessions.load(real_data / "session-yoochoose100k").part
    assert clicks is not None and np.bincount(clicks).tolist() == [70_278, 0, 13_568]
    tables = sessions.load(real_data / "session-diginetica", variant="diginetica")
    assert tables.part is not None and np.bincount(tables.part).tolist() == [906_140, 0, 60_858 + 15_963]
    assert tables.events["session"].n_unique() == 186_670 + 15_963


def test_no_source_needs_the_network_to_be_imported() -> None:
    assert download.fetch is movielens.fetch
