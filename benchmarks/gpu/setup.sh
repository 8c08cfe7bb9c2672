# Sourced on a GPU machine with torch: installs the wheels of the folder $1 beside it, if there is one, and makes the model
# of the shape $2 in $MODELS, if it is not there yet.
export MODELS=${MODELS:-/tmp/models} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
if [ -d "$1" ] && [ ! -d /tmp/site ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "$1"/*.whl
fi
export PYTHONPATH=$PWD:/tmp/site PATH=/tmp/site/bin:$PATH
[ -d "$MODELS/$2" ] || python3 -m dynserve make-model --like "$2" "$MODELS/$2"
