"""The files of a cache: manifest, index, shards, sealed JSON files, quarantine; and objects of a store.

Defines the format of each file and checks it; independent of writers (`build`) and readers (`read`).
Imports only `models`. A new file of a cache is a file here.
"""
