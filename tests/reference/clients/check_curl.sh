#!/usr/bin/env bash
# curl: plain, gzip, a stream, a large body without a key, a wrong path, a wrong method.
#     check_curl.sh BASE_URL MODEL [--key KEY] [--all]
set -uo pipefail
url=${1%/} model=$2 key=none all=
shift 2
while [ $# -gt 0 ]; do
    case $1 in --key) key=$2; shift ;; --all) all=1 ;; --*) shift ;; esac
    shift
done
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
passed=0 failed=0
ask() { curl -sS --max-time 60 -H "authorization: Bearer $key" -H 'content-type: application/json' "$@"; }
holds() { # NAME GOT PATTERN
    if grep -qE -- "$3" <<<"$2"; then passed=$((passed + 1)); echo "ok   $1"; return; fi
    failed=$((failed + 1)); echo "FAIL $1: got '$(tr '\r\n' '  ' <<<"$2" | cut -c1-500)', expected /$3/"
    [ "$all" ] || { echo "$passed passed, $failed failed"; exit 1; }
}

echo "client curl $(curl --version | head -1 | cut -d' ' -f2)"
printf '{"model": "%s", "max_tokens": 4, "temperature": 0, "messages": [{"role": "user", "content": "Where is Paris?"}]}' "$model" >"$work/chat.json"
gzip -k "$work/chat.json"
head -c 100000000 /dev/zero | gzip >"$work/bomb.gz"
head -c 20000000 /dev/zero | tr '\0' ' ' >"$work/large"
chat=$url/chat/completions

holds 'a chat' "$(ask "$chat" --data-binary @"$work/chat.json")" '"content":"[^"]'
holds 'a gzip body' "$(ask "$chat" --data-binary @"$work/chat.json.gz" -H 'content-encoding: gzip')" '"content":"[^"]'
holds 'a gzip body, chunked' "$(ask "$chat" -T - -X POST -H 'content-encoding: gzip' <"$work/chat.json.gz")" '"content":"[^"]'
holds 'a gzip body that is none' "$(ask -i "$chat" --data-binary @"$work/chat.json" -H 'content-encoding: gzip')" '^HTTP/1.1 400'
holds 'a gzip body too large once unpacked' "$(ask -i "$chat" --data-binary @"$work/bomb.gz" -H 'content-encoding: gzip')" '^HTTP/1.1 413'
holds 'an encoding that is not known' "$(ask -i "$chat" --data-binary @"$work/chat.json" -H 'content-encoding: br')" '^HTTP/1.1 415'
holds 'a stream' "$(sed 's/^{/{"stream": true, /' "$work/chat.json" | ask -N "$chat" --data-binary @-)" '^data: \[DONE\]'
for path in /chat/completions /v1/chat/completions/ /v1/v1/chat/completions; do
    holds "a 404 at $path" "$(ask -i "${url%/v1}$path" --data-binary @"$work/chat.json")" '^HTTP/1.1 404'
    holds "the hint at $path" "$(ask "${url%/v1}$path" --data-binary @"$work/chat.json")" 'did you mean `?/v1/chat/completions'
done
holds 'a wrong method' "$(ask -i "$chat")" '^[Aa]llow: .*POST'
holds 'a body left unread' "$(ask -i "$chat" --data-binary @"$work/large" -H 'expect:')" '^HTTP/1.1 413'
holds 'a body left unread closes' "$(ask -i "$chat" --data-binary @"$work/large" -H 'expect:')" '^[Cc]onnection: close'
if [ "$key" != none ]; then
    key=wrong
    holds 'a wrong key with a body' "$(ask -i "$chat" --data-binary @"$work/large" -H 'expect:')" '^HTTP/1.1 401'
    holds 'a wrong key closes' "$(ask -i "$chat" --data-binary @"$work/large" -H 'expect:')" '^[Cc]onnection: close'
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
