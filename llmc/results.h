// results.h: the lines of dev/results, one JSON object a measurement.
#ifndef LLMC_RESULTS_H
#define LLMC_RESULTS_H
#include "utils.h"
#include <ctype.h>

// Opens dev/results/GPU.jsonl to append a line (RESULTS in the environment names another file; "": none) and
// begins the line with what all share: the commit, from COMMIT in the environment, the date, the GPU, how
// many of it, and the program. NULL, with a note, where there is nothing to write to.
static inline FILE *results_open(const char *gpu, int gpus, const char *program) {
    static const char *const known[] = {"GB200", "B200", "H200", "H100", "A100"};
    char file[64] = "gpu", path[PATH_BYTES], date[32];
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (!strstr(gpu, known[i])) continue;
        for (size_t j = 0; j <= strlen(known[i]); j++) file[j] = (char)tolower((unsigned char)known[i][j]);
        break;
    }
    const char *given = getenv("RESULTS"), *commit = getenv("COMMIT");
    if (given && !given[0]) return NULL;
    if (given)
        snprintf(path, sizeof path, "%s", given);
    else
        snprintf(path, sizeof path, "dev/results/%s.jsonl", file);
    FILE *f = fopen(path, "a");
    if (!f) {
        printf("not recorded: cannot append to %s: %s\n", path, strerror(errno));
        return NULL;
    }
    time_t now = time(NULL);
    strftime(date, sizeof date, "%Y-%m-%d", gmtime(&now));
    fprintf(f, "{\"commit\":\"%s\",\"date\":\"%s\",\"gpu\":\"%s\",\"gpus\":%d,\"program\":\"%s\"",
            commit ? commit : "", date, gpu, gpus, program);
    return f;
}
#endif
