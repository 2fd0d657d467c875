#!/usr/bin/env bash
# The API with nothing but curl: is the server ready, what does it serve, make a picture, fetch it by its URL.
#
#   examples/curl.sh            writes output.png
set -euo pipefail

url=${PHOTOGRAM_URL:-http://localhost:30000}
key=${PHOTOGRAM_API_KEY:-not-needed}
output=${1:-output.png}

curl -sS --fail-with-body "$url/ready"; echo
curl -sS --fail-with-body "$url/models" -H "Authorization: Bearer $key"; echo

answer=$(curl -sS --fail-with-body "$url/v1/images/generations" \
  -H "Content-Type: application/json" \
  -H "Authorization: Bearer $key" \
  -d '{
    "prompt": "a green triangle on a black background",
    "size": "256x256",
    "seed": 7,
    "response_format": "url"
  }')
path=$(sed -E 's/.*"url": ?"([^"]*)".*/\1/' <<<"$answer")
case $path in http*) address=$path ;; *) address=$url$path ;; esac

curl -sS --fail-with-body -L "$address" -H "Authorization: Bearer $key" -o "$output"
echo "$output"
