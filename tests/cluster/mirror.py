"""mirror.py ADDRESS REPO REVISION FOLDER [STALL]: a Hugging Face endpoint for one repository at one commit. Prints its port.

The first request for the file STALL gets half of it, and then nothing as long as the client holds the line.
"""

import hashlib
import http.server
import json
import sys
from pathlib import Path

address, repo, revision, folder = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
to_stall = set(sys.argv[5:6])
files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def sibling(name):
    data = files[name]
    return {
        "rfilename": name,
        "size": len(data),
        "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)},
    }


listing = json.dumps({"sha": revision, "siblings": [sibling(name) for name in sorted(files)]}).encode()


class Mirror(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0]
        prefix = f"/{repo}/resolve/{revision}/"
        if path == f"/api/models/{repo}/revision/{revision}":
            status, body = 200, listing
        elif path.startswith(prefix) and path.removeprefix(prefix) in files:
            status, body = 200, files[path.removeprefix(prefix)]
        else:
            status, body = 404, b"not here"
        # A partial file goes on where it ended.
        start = 0
        asked = self.headers.get("Range", "")
        if status == 200 and asked.startswith("bytes=") and asked.endswith("-"):
            start, status = int(asked[6:-1]), 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        name = path.removeprefix(prefix)
        if name in to_stall:
            to_stall.remove(name)
            self.wfile.write(body[start : (start + len(body)) // 2])
            self.rfile.read(1)  # Returns when the client goes.
            self.close_connection = True
            return
        self.wfile.write(body[start:])

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer((address, 0), Mirror)
print(server.server_address[1], flush=True)
server.serve_forever()
