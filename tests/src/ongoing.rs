//! Work in a Linux guest that goes on for as long as a test disturbs it, however fast the machine is: shell commands for the
//! guest, to be run one after the other.

/// Starts `work`, which is done over and over, and at least once, until [`FINISH`] or until it fails.
#[must_use]
pub fn start(work: &str) -> String {
    format!(
        "(while :; do ({work}) >/tmp/said 2>&1; code=$?; [ $code = 0 ] && [ ! -e /tmp/enough ] || break; done; \
         echo $code >/tmp/code) &"
    )
}

/// Succeeds while the work goes on; it has failed otherwise, and this prints what it said.
pub const GOES_ON: &str = "[ ! -e /tmp/code ] || { cat /tmp/said; false; }";

/// Lets the work come to its end; the exit code and the output are those of the last time it was done.
pub const FINISH: &str = "touch /tmp/enough; until [ -s /tmp/code ]; do sleep 0.1; done; cat /tmp/said; \
                          read -r code </tmp/code; rm /tmp/said /tmp/code /tmp/enough; exit $code";
