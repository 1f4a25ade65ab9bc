# shellcheck shell=bash
# Sourced by batch scripts and by check_modules.sh: defines `module`, which a shell that is not a login shell may lack.
# Sites define it in a file of /etc/profile.d; for other installations MODULESHOME or LMOD_PKG is set.

if ! type module >/dev/null 2>&1; then
    for hpc_router_file in /etc/profile.d/*module*.sh /etc/profile.d/*lmod*.sh \
        "${MODULESHOME:-}/init/bash" "${LMOD_PKG:-}/init/bash" \
        /usr/share/modules/init/bash /usr/share/Modules/init/bash /usr/share/lmod/lmod/init/bash; do
        if [[ -r $hpc_router_file ]]; then
            # shellcheck source=/dev/null
            . "$hpc_router_file" >/dev/null 2>&1
        fi
        if type module >/dev/null 2>&1; then
            break
        fi
    done
    unset hpc_router_file
fi
