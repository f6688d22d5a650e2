"""``commhooks bench``: measures schemes on the ranks it runs on, by real forward and backward passes."""
