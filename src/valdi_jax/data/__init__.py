"""Episodes: collection, storage and sampling."""
