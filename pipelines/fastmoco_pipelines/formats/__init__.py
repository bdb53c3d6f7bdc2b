"""Files to records and back: tars, labels, image headers, indexes, manifests, quarantine lists."""
