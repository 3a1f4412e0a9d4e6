#!/bin/bash
# Prints the run folder of train.py's arguments:  run_folder.sh RECIPE [--output DIR] [section.key=value ...]
recipe=$1
shift
name=$(basename "$recipe")
folder=runs/$(basename "$(dirname "$(realpath "$recipe")")")/${name%.*} # train.py's own default
previous=
for argument in "$@"; do
    case $argument in --output=*) folder=${argument#--output=} ;; esac
    [ "$previous" = --output ] && folder=$argument
    previous=$argument
done
printf '%s\n' "$folder"
