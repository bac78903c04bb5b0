"""Work that is not waited for: thousands of images by one call, their answers later. It needs `QUEUE=redis`."""
