#!/usr/bin/env bash
# Makes a private certificate authority and one certificate for the processes of a cluster, for --plane-tls-*: ca.crt, tls.crt, tls.key.
#     plane-certificates.sh FOLDER [NAME…]
# NAMEs are names or addresses of NATS and etcd that use the certificate, too. The authority's key is thrown away, so nobody
# can sign another one: to renew the certificate, make all three files anew and restart all processes.
set -euo pipefail

if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: $0 FOLDER [NAME…]" >&2
    exit 2
fi
folder=$1
shift
umask 077
mkdir -p "$folder"
for file in ca.crt tls.crt tls.key; do
    if [ -e "$folder/$file" ]; then
        echo "$folder/$file exists; remove it, or use another folder" >&2
        exit 1
    fi
done
private=$(mktemp -d)
trap 'rm -rf "$private"' EXIT

names="DNS:localhost,IP:127.0.0.1,IP:::1"
for name in "$@"; do
    case $name in
        *[!0-9.]*) case $name in *:*) names="$names,IP:$name" ;; *) names="$names,DNS:$name" ;; esac ;;
        *) names="$names,IP:$name" ;;
    esac
done

openssl ecparam -name prime256v1 -genkey -noout -out "$private/ca.key"
openssl req -x509 -new -key "$private/ca.key" -days 3650 -subj "/CN=dynserve planes" -out "$folder/ca.crt" \
    -addext "keyUsage=critical,keyCertSign,cRLSign"
openssl ecparam -name prime256v1 -genkey -noout -out "$folder/tls.key"
openssl req -new -key "$folder/tls.key" -subj "/CN=dynserve" -out "$private/tls.csr"
cat > "$private/extensions" << EOF
subjectAltName=$names
basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=serverAuth,clientAuth
subjectKeyIdentifier=hash
authorityKeyIdentifier=keyid
EOF
openssl x509 -req -in "$private/tls.csr" -CA "$folder/ca.crt" -CAkey "$private/ca.key" -CAcreateserial \
    -CAserial "$private/serial" -days 3650 -extfile "$private/extensions" -out "$folder/tls.crt" 2> "$private/log" \
    || { cat "$private/log" >&2; exit 1; }
echo "wrote $folder/ca.crt, tls.crt and tls.key, valid for ten years"
