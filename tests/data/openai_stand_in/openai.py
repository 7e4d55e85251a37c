"""What `examples/router.py` uses of the openai client, for machines without it: the same names, over urllib."""

import json
import urllib.request


class OpenAI:
    def __init__(self, base_url, api_key):
        self.base_url = base_url
        self.headers = {"authorization": f"Bearer {api_key}", "content-type": "application/json"}

    def post(self, path, *, body, cast_to):
        assert cast_to is object
        request = urllib.request.Request(self.base_url + path, json.dumps(body).encode(), self.headers)
        with urllib.request.urlopen(request) as response:
            return json.load(response)
