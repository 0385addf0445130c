"""Offline work: files of requests, one a line, and the files of their answers; in a server's folder or a command's.

Never words an answer itself: lines go to the routes that HTTP requests go to. Begin with `line_runner`; `batch_service`
keeps the batches of a server.
"""
