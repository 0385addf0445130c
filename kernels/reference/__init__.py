"""The definition of each operation in plain torch: the oracle of the tests, and what runs where nothing faster does."""
