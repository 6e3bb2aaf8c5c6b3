"""funnelrec: from an events table and a catalogue to a recommender."""
