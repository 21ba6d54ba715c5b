"""What a cache is on disk: manifest, index, shards, sealed JSON files, the quarantine; and a store's objects.

Knows how each file looks and checks it; knows neither who makes it (`build`) nor who reads it (`read`).
Imports `models` alone. A new file of a cache is a file here.
"""
