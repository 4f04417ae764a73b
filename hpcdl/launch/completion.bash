# Tab completion for `hpcdl launch` and `python -m hpcdl.launch`, in bash and zsh:
#   eval "$(hpcdl launch -sc install=bash)"
_hpcdl_launch_complete() {
    local line=${COMP_LINE:0:COMP_POINT} ask rest cut
    COMPREPLY=()
    case "$line" in
    *" -m hpcdl.launch "*) ask="${COMP_WORDS[0]} -m hpcdl.launch" rest=${line#* -m hpcdl.launch } ;;
    *hpcdl" "launch" "*) ask="${COMP_WORDS[0]} launch" rest=${line#*hpcdl launch } ;;
    *) return 0 ;; # not ours: the shell's own completion
    esac
    # Hydra answers with whole words: the line it is asked about has one word for the program.
    # shellcheck disable=SC2086 # ask is a command and its arguments
    local choices=$(COMP_LINE="hpcdl $rest" $ask -sc query=bash 2>/dev/null)
    local word=${rest##* }
    # shellcheck disable=SC2207 # choices hold no spaces
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
    # bash takes = for the end of a word: what stands before it must not come twice.
    if [[ $COMP_WORDBREAKS == *=* && $word == *=* ]]; then
        cut=${word%"${word##*=}"}
        COMPREPLY=("${COMPREPLY[@]#"$cut"}")
    fi
}
complete -o nospace -o bashdefault -o default -F _hpcdl_launch_complete hpcdl python python3
