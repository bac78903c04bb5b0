"""Many images at once, without HTTP: a folder or a data set is classified or purified with Ray Data. Extra `bulk`."""
