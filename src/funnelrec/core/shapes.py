"""The legend of dimension letters used in every shape annotation and shape comment.

| letter | meaning                                                          |
|--------|------------------------------------------------------------------|
| B      | batch: examples (or users) handled together                      |
| C      | candidates of one request; in `ids`, the integer columns         |
| D      | width of an embedding or hidden vector                           |
| F      | fields (one vector each after multi-valued fields are pooled)    |
| H      | attention heads                                                  |
| K      | interests of a user                                              |
| L      | history length; the newest item stands in slot L-1 (right-aligned) |
| M      | numeric columns                                                  |
| N      | item rows of the catalogue, rows 0 (padding) and 1 (unknown) included |
| P      | training pairs (user vector, target item)                        |
| S      | sampled negatives                                                |
| V      | rows of an embedding table                                       |
"""

from __future__ import annotations

PADDING = 0  #: row 0 of every vocabulary and table: "nothing here"; its vector is and stays zero
UNKNOWN = 1  #: row 1 of every vocabulary: "something that training never saw"
FIRST_KNOWN = 2  #: the first row that stands for a real value
