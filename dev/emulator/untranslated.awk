# untranslated.awk: prints an error for each line of a translated file that has code for nvcc outside comments and
# strings, and fails if there is one. source: the name of the file before its translation, which has the same lines.
BEGIN {
    word = "(^|[^A-Za-z0-9_])(asm|__asm|__asm__|__cluster_dims__|__CUDA_ARCH__|cooperative_groups)([^A-Za-z0-9_]|$)"
    skip = "\"([^\"\\\\]|\\\\.)*\"|\047(\\\\.|[^\\\\])\047|//|/[*]" # a string, a character, the begin of a comment
}
{
    line = $0
    code = ""
    while (line != "") {
        if (in_comment) {
            end = index(line, "*/")
            if (!end) break
            in_comment = 0
            line = substr(line, end + 2)
        } else if (match(line, skip)) {
            token = substr(line, RSTART, 2)
            code = code substr(line, 1, RSTART - 1) " "
            line = substr(line, RSTART + RLENGTH)
            if (token == "//") break
            in_comment = token == "/*"
        } else {
            code = code line
            break
        }
    }
    if (match(code, "<<<") || match(code, "extern[ \t]+__shared__") || match(code, word)) {
        found = substr(code, RSTART, RLENGTH)
        gsub("^[^A-Za-z_<]+|[^A-Za-z_<]+$", "", found)
        printf "%s:%d: error: the emulator cannot translate %s: %s\n", source, FNR, found, $0
        failed = 1
    }
}
END { exit failed }
