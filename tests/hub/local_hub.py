"""A tiny in-memory server speaking the part of the Hugging Face Hub HTTP API that huggingface_hub 2.4 uses.

Standard library (plus PyYAML for card validation). `with LocalHub() as hub:` starts it on a free loopback port.
Text is committed inline ("regular"); files that look binary go through the LFS batch API ("lfs"), which needs
HF_HUB_DISABLE_XET in the client. A test may put a function at `hub.fault`: it is told of every request, "before" it is
served and "after", when the answer is not yet sent, and raises HubError to answer otherwise or Dropped to break the
connection.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
PREFIX = {"model": "", "dataset": "datasets/", "space": "spaces/"}


class HubError(Exception):
    def __init__(self, status, message, code=None, headers=None, **body):
        self.status, self.headers, self.body = status, dict(headers or {}), {"error": message, **body}
        self.headers["X-Error-Message"] = message
        if code:
            self.headers["X-Error-Code"] = code


class Dropped(Exception):
    """The connection breaks."""


class Repo:
    def __init__(self, kind, rid, private):
        self.kind, self.id, self.private, self.created = kind, rid, private, now()
        self.commits, self.branches, self.tags = {}, {}, {}
        self.commit("main", {}, "initial commit", "")

    def commit(self, branch, tree, title, message):
        parent = self.branches.get(branch)
        sha = hashlib.sha1(
            json.dumps([self.id, parent, sorted(tree), title, len(self.commits), time.time()]).encode()
        ).hexdigest()
        self.commits[sha] = {"parent": parent, "tree": tree, "title": title, "message": message, "date": now()}
        self.branches[branch] = sha
        return sha

    def resolve(self, rev):
        rev = rev or "main"
        sha = self.branches.get(rev) or self.tags.get(rev) or (rev if rev in self.commits else None)
        if sha is None:  # the Hub also accepts short hashes and refs/... names
            hits = [c for c in self.commits if len(rev) >= 7 and c.startswith(rev)]
            sha = hits[0] if len(hits) == 1 else self.branches.get(rev.removeprefix("refs/heads/"))
        if sha is None:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return sha

    def info(self, sha, blobs=False):
        tree = self.commits[sha]["tree"]
        card = front_matter(tree["README.md"]["data"]) if "README.md" in tree else {}
        sib = [
            dict(rfilename=p, **(dict(size=f["size"], blobId=f["oid"], **lfs_of(f)) if blobs else {}))
            for p, f in tree.items()
        ]
        return {
            "_id": self.id, "id": self.id, "modelId": self.id, "author": self.id.split("/")[0], "sha": sha,
            "private": self.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0,
            "createdAt": self.created, "cardData": card, "lastModified": self.commits[sha]["date"],
            "tags": list(card.get("tags", [])), "siblings": sib, "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
        }  # fmt: skip


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


def front_matter(data):
    m = re.match(rb"---\r?\n(.*?)\r?\n---", data, re.S)
    if not m:
        return {}
    import yaml

    return yaml.safe_load(m.group(1)) or {}


def blob(data, lfs):
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"data": data, "oid": oid, "size": len(data), "sha256": hashlib.sha256(data).hexdigest() if lfs else None}


def looks_binary(sample):
    try:
        return "\0" in sample.decode()
    except UnicodeDecodeError as e:
        return e.start < len(sample) - 3  # a character cut at the end of the sample is not a sign of binary data


def lfs_of(f):
    return (
        {"lfs": {"oid": f["sha256"], "sha256": f["sha256"], "size": f["size"], "pointerSize": 134}}
        if f["sha256"]
        else {}
    )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are written apart: the second would wait for an acknowledgement

    def log_message(self, *a):
        pass

    def reply(self, status=200, body=None, headers=None, raw=None):
        self.server.hub.fault("after", self.command, self.path)
        self.send(status, body, headers, raw)

    def send(self, status, body=None, headers=None, raw=None):
        raw = (b"" if body is None else json.dumps(body).encode()) if raw is None else raw
        self.send_response(status)
        for k, v in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def handle_any(self):
        hub, url = self.server.hub, urlsplit(self.path)
        self.query = {k: v[-1] for k, v in parse_qs(url.query).items()}
        self.data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.log.append((self.command, self.path))
        try:
            hub.fault("before", self.command, self.path)
            with hub.lock:
                for method, pattern, name in ROUTES:
                    m = re.fullmatch(pattern, url.path)
                    if m and self.command in method.split("|"):
                        groups = {k: unquote(v) if v is not None else None for k, v in m.groupdict().items()}
                        if self.command in ("POST", "DELETE", "PUT") and name not in ("validate", "paths", "put_lfs"):
                            self.need_token()
                        return getattr(self, name)(hub, **groups)
            raise HubError(404, f"no such route: {self.command} {url.path}")
        except HubError as e:
            self.send(e.status, e.body, e.headers)
        except Dropped:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any

    def need_token(self):
        if self.headers.get("Authorization") != f"Bearer {self.server.hub.token}":
            raise HubError(401, "Invalid username or password.")

    def repo(self, hub, kind, rid):
        repo = hub.repos.get((KINDS.get(kind, kind), rid))
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {hub.token}"):
            raise HubError(
                401 if not self.headers.get("Authorization") else 404, "Repository not found", "RepoNotFound"
            )
        return repo

    # --- account, repositories -------------------------------------------------------------------------------------
    def validate(self, hub):
        import yaml

        d = json.loads(self.data)
        try:
            meta = front_matter(d["content"].encode())
        except yaml.YAMLError as e:
            return self.reply(400, {"errors": [{"message": str(e)}], "warnings": []})
        self.reply(
            body={
                "errors": [],
                "warnings": [] if meta else [{"message": "empty or missing yaml metadata in repo card"}],
            }
        )

    def create(self, hub):
        d = json.loads(self.data)
        kind, rid = d.get("type") or "model", f"{d.get('organization') or hub.user}/{d['name']}"
        url = f"{hub.endpoint}/{PREFIX[kind]}{rid}"
        if (kind, rid) in hub.repos:
            raise HubError(409, f"You already created this {kind} repo: {rid}", url=url)
        hub.repos[kind, rid] = Repo(kind, rid, d.get("visibility") == "private" or bool(d.get("private")))
        self.reply(body={"url": url, "name": rid, "id": rid})

    def info(self, hub, kind, rid, rev=None):
        repo = self.repo(hub, kind, rid)
        self.reply(body=repo.info(repo.resolve(rev), "blobs" in self.query))

    # --- reading ---------------------------------------------------------------------------------------------------
    def entries(self, tree, under="", recursive=True):
        under, out, dirs = (under or "").strip("/"), [], {}
        for path, f in sorted(tree.items()):
            if under and not path.startswith(under + "/"):
                continue
            rest = path[len(under) + 1 if under else 0 :].split("/")
            for i in range(1, len(rest) if recursive else min(len(rest), 2)):
                d = "/".join(([under] if under else []) + rest[:i])
                dirs[d] = {"type": "directory", "path": d, "oid": hashlib.sha1(d.encode()).hexdigest(), "size": 0}
            if recursive or len(rest) == 1:
                out.append(dict(type="file", path=path, oid=f["oid"], size=f["size"], **lfs_of(f)))
        return list(dirs.values()) + out

    def tree(self, hub, kind, rid, rev, path=None):
        repo = self.repo(hub, kind, rid)
        out = self.entries(
            repo.commits[repo.resolve(rev)]["tree"], path, self.query.get("recursive", "").lower() in ("true", "1")
        )
        if path and not out:
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        self.reply(body=out)

    def paths(self, hub, kind, rid, rev):
        repo = self.repo(hub, kind, rid)
        want = [p.strip("/") for p in parse_qs(self.data.decode()).get("paths", [])]
        self.reply(body=[e for e in self.entries(repo.commits[repo.resolve(rev)]["tree"]) if e["path"] in want])

    def refs(self, hub, kind, rid):
        repo = self.repo(hub, kind, rid)

        def ref(where, refs):
            return [{"name": n, "ref": f"refs/{where}/{n}", "targetCommit": s} for n, s in refs.items()]

        self.reply(
            body={
                "branches": ref("heads", repo.branches),
                "tags": ref("tags", repo.tags),
                "converts": [],
                "pullRequests": [],
            }
        )

    def file(self, hub, kind, rid, rev, path):
        repo = self.repo(hub, {"datasets/": "dataset", "spaces/": "space"}.get(kind, "model"), rid)
        sha = repo.resolve(rev)
        f = repo.commits[sha]["tree"].get(path)
        head = {"X-Repo-Commit": sha}
        if f is None:
            raise HubError(404, "Entry not found", "EntryNotFound", head)
        if f[
            "sha256"
        ]:  # the Hub redirects to a CDN on another host; a redirect to the same host would be followed and lose these
            head |= {"X-Linked-ETag": f'"{f["sha256"]}"', "X-Linked-Size": str(f["size"])}
        self.bytes(f["data"], head | {"ETag": f'"{f["sha256"] or f["oid"]}"'})

    def bytes(self, data, head):
        m = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status = 206 if m else 200
        if m:
            lo, hi = int(m[1]), int(m[2] or len(data) - 1)
            head["Content-Range"], data = f"bytes {lo}-{hi}/{len(data)}", data[lo : hi + 1]
        self.reply(
            status, raw=data, headers={"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **head}
        )

    # --- writing ---------------------------------------------------------------------------------------------------
    def preupload(self, hub, kind, rid, rev):
        repo = self.repo(hub, kind, rid)
        tree, out = repo.commits[repo.resolve(rev)]["tree"], []
        for f in json.loads(self.data)["files"]:
            binary = looks_binary(base64.b64decode(f["sample"]))
            old = tree.get(f["path"])
            out.append(
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if binary else "regular",
                    "shouldIgnore": False,
                    "oid": old and (old["sha256"] or old["oid"]),
                }
            )
        self.reply(body={"files": out})

    def batch(self, hub, kind, rid):
        self.repo(hub, KINDS.get((kind or "").strip("/"), "model"), rid)
        out = [
            dict(
                oid=o["oid"],
                size=o["size"],
                **(
                    {}
                    if o["oid"] in hub.objects
                    else {"actions": {"upload": {"href": f"{hub.endpoint}/lfs/{o['oid']}"}}}
                ),
            )
            for o in json.loads(self.data)["objects"]
        ]
        self.reply(body={"transfer": "basic", "objects": out})

    def put_lfs(self, hub, oid):
        if hashlib.sha256(self.data).hexdigest() != oid:
            raise HubError(400, "sha256 does not match")
        hub.objects[oid] = self.data
        self.reply()

    def commit(self, hub, kind, rid, rev):
        repo = self.repo(hub, kind, rid)
        if rev not in repo.branches:
            repo.resolve(rev)
            raise HubError(400, f"{rev} is not a branch")
        lines = [json.loads(x) for x in self.data.splitlines()]
        head, tree = lines[0]["value"], dict(repo.commits[repo.branches[rev]]["tree"])
        if head.get("parentCommit", repo.branches[rev]) != repo.branches[rev]:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        for op in lines[1:]:
            v, path = op["value"], op["value"]["path"]
            if op["key"] == "file":
                tree[path] = blob(base64.b64decode(v["content"]), False)
            elif op["key"] == "lfsFile":
                if v["oid"] not in hub.objects:
                    raise HubError(400, f"LFS object {v['oid']} was not uploaded")
                tree[path] = blob(hub.objects[v["oid"]], True)
            else:
                gone = [
                    p
                    for p in tree
                    if p == path or (op["key"] == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))
                ]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for p in gone:
                    del tree[p]
        sha = repo.commit(rev, tree, head["summary"], head.get("description", ""))
        self.reply(
            body={
                "success": True,
                "commitOid": sha,
                "commitUrl": f"{hub.endpoint}/{PREFIX[repo.kind]}{rid}/commit/{sha}",
                "hookOutput": "",
            }
        )

    def tag(self, hub, kind, rid, name):
        repo, new = self.repo(hub, kind, rid), json.loads(self.data)["tag"]
        if new in repo.tags:
            raise HubError(409, f"tag {new} exists already")
        repo.tags[new] = repo.resolve(name)
        self.reply()


K, ID = r"(?P<kind>models|datasets|spaces)", r"(?P<rid>[^/]+/[^/]+?)"
ROUTES = [
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", "/api/repos/create", "create"),
    ("GET", f"/api/{K}/{ID}(/revision/(?P<rev>[^/]+))?", "info"),
    ("GET", f"/api/{K}/{ID}/tree/(?P<rev>[^/]+)(/(?P<path>.+))?", "tree"),
    ("POST", f"/api/{K}/{ID}/paths-info/(?P<rev>[^/]+)", "paths"),
    ("GET", f"/api/{K}/{ID}/refs", "refs"),
    ("POST", f"/api/{K}/{ID}/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", f"/api/{K}/{ID}/commit/(?P<rev>[^/]+)", "commit"),
    ("POST", f"/api/{K}/{ID}/tag/(?P<name>[^/]+)", "tag"),
    ("POST", f"/(?P<kind>datasets/|spaces/)?{ID}\\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "put_lfs"),
    ("GET|HEAD", f"/(?P<kind>datasets/|spaces/)?{ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "file"),
]


class LocalHub:
    def __init__(self, user="user", token="hf_local"):
        self.user, self.token = user, token
        self.repos, self.objects, self.log, self.lock = {}, {}, [], threading.RLock()
        self.fault = lambda when, command, path: None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub, self.server.daemon_threads = self, True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()
