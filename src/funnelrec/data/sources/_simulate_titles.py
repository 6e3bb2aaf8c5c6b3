"""Words and titles of the simulated world: ten topics of four sub-topics, each with its own vocabulary.

A title is made of an adjective of its topic, a noun of its sub-topic and a closing word of its topic, so that text
tells the topic and, mostly, the sub-topic, without ever naming either.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["SUBTOPICS", "TOPICS", "titles"]

#: topic -> adjectives | closing words | sub-topics with their nouns
_WORDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "kitchen": (
        "Quiet Warm Golden Slow Rustic Hungry Little Sunday",
        "Kitchen Table Recipes Supper Oven Pantry Feast",
        {
            "bread": "Sourdough Rye Crust Bakery Flour",
            "soup": "Broth Ladle Noodle Cauldron Lentil",
            "spice": "Saffron Pepper Cinnamon Cardamom Chilli",
            "dessert": "Honey Praline Meringue Sugar Caramel",
        },
    ),
    "sea": (
        "Salt Blue Drifting Deep Foggy Northern Silver Restless",
        "Tide Coast Waters Bay Crossing Shore Currents",
        {
            "harbour": "Harbour Pier Anchor Dockside Ferry",
            "reef": "Coral Lagoon Seahorse Atoll Anemone",
            "voyage": "Compass Sailcloth Captain Schooner Mast",
            "lighthouse": "Lantern Beacon Keeper Lighthouse Foghorn",
        },
    ),
    "mountain": (
        "High White Steep Windswept Hidden Stone Lonely Distant",
        "Ridge Ascent Pass Heights Refuge Slopes Range",
        {
            "summit": "Summit Pinnacle Cairn Spire Crest",
            "glacier": "Glacier Icefall Crevasse Snowfield Moraine",
            "trail": "Footpath Waymark Rucksack Switchback Boots",
            "valley": "Meadow Shepherd Chalet Brook Hamlet",
        },
    ),
    "sky": (
        "Dark Endless Burning Silent Violet Falling Farthest Luminous",
        "Orbit Skies Heavens Night Horizon Zenith Cosmos",
        {
            "planet": "Saturn Jupiter Neptune Exoplanet Mercury",
            "comet": "Comet Meteor Perihelion Stardust Fireball",
            "telescope": "Telescope Observatory Lens Mirror Stargazer",
            "moon": "Moonrise Eclipse Crater Crescent Tranquility",
        },
    ),
    "garden": (
        "Green Walled Dewy Blooming Fragrant Secret Early Tangled",
        "Garden Spring Border Seasons Greenhouse Beds Hedgerow",
        {
            "rose": "Rose Briar Petal Damask Thorn",
            "orchard": "Apple Quince Blossom Cider Plum",
            "bee": "Beehive Bumblebee Pollen Clover Nectar",
            "herb": "Thyme Lavender Basil Sage Rosemary",
        },
    ),
    "music": (
        "Electric Smoky Tender Wild Velvet Echoing Soulful Midnight",
        "Sessions Encore Melody Rehearsal Concert Overture Chorus",
        {
            "jazz": "Saxophone Trumpet Swing Bebop Clarinet",
            "choir": "Cantata Hymn Soprano Madrigal Chapel",
            "strings": "Violin Cello Harp Quartet Sonata",
            "drums": "Drum Cymbal Snare Marimba Timpani",
        },
    ),
    "machine": (
        "Iron Clever Humming Precise Copper Grand Turning Riveted",
        "Workshop Works Blueprint Mechanism Foundry Invention Factory",
        {
            "clock": "Clockwork Pendulum Escapement Chronometer Cogwheel",
            "engine": "Locomotive Piston Turbine Boiler Throttle",
            "robot": "Automaton Android Servo Circuit Gripper",
            "bridge": "Girder Viaduct Suspension Cantilever Drawbridge",
        },
    ),
    "animal": (
        "Gentle Swift Curious Furry Roaming Sleepy Brave Spotted",
        "Tracks Companions Wilderness Instinct Herd Burrow Sanctuary",
        {
            "fox": "Fox Vixen Den Cub Russet",
            "bird": "Heron Sparrow Nest Falcon Plumage",
            "horse": "Mare Gallop Stallion Bridle Foal",
            "whale": "Whale Dolphin Orca Narwhal Humpback",
        },
    ),
    "history": (
        "Lost Ancient Forgotten Royal Crumbling Noble Fabled Besieged",
        "Chronicle Dynasty Legacy Age Century Memoirs Annals",
        {
            "castle": "Castle Rampart Knight Moat Turret",
            "empire": "Emperor Legion Senate Aqueduct Consul",
            "letter": "Parchment Quill Courier Cipher Wax",
            "ruin": "Temple Column Amphora Mosaic Obelisk",
        },
    ),
    "sport": (
        "Fast Final Fearless Muddy Winning Daring Tireless Roaring",
        "Champions League Season Finish Rivals Tournament Record",
        {
            "running": "Marathon Sprinter Relay Hurdle Stride",
            "cycling": "Peloton Velodrome Saddle Breakaway Pedal",
            "ball": "Goalkeeper Striker Penalty Midfield Dribble",
            "water": "Swimmer Rower Regatta Paddle Diver",
        },
    ),
}

TOPICS: tuple[str, ...] = tuple(_WORDS)
#: sub-topic s belongs to topic s // 4
SUBTOPICS: tuple[str, ...] = tuple(name for _, _, nouns in _WORDS.values() for name in nouns)

_PATTERNS = (
    "The {a} {n} {c}",
    "The {a} {n}",
    "{a} {c}: {n}",
    "The {c} of the {a} {n}",
    "{n} and the {a} {c}",
    "{a} {n} {c}",
)


def titles(subtopic: npt.NDArray[np.int64], rng: np.random.Generator) -> list[str]:
    """A title for each item, unique: a repeated one gets a volume number."""
    words = [(a.split(), c.split(), n.split()) for a, c, subs in _WORDS.values() for n in subs.values()]
    draws = rng.random((len(subtopic), 4)).tolist()
    made: list[str] = []
    seen: dict[str, int] = {}
    for sub, (pattern, adjective, noun, closing) in zip(subtopic.tolist(), draws, strict=True):
        adjectives, closings, nouns = words[sub]
        title = _PATTERNS[int(pattern * len(_PATTERNS))].format(
            a=adjectives[int(adjective * len(adjectives))],
            n=nouns[int(noun * len(nouns))],
            c=closings[int(closing * len(closings))],
        )
        seen[title] = seen.get(title, 0) + 1
        made.append(title if seen[title] == 1 else f"{title}, Volume {seen[title]}")
    return made
