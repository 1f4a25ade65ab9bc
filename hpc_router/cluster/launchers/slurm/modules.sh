# shellcheck shell=bash
# Sourced by batch scripts and by check_modules.sh: makes `module` known where a shell that is no login shell lacks it.
# Sites define it in a file of /etc/profile.d; one that was installed by hand says where in MODULESHOME or LMOD_PKG.

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
