//! Having the kernel count what connections carry.

use std::path::Path;

/// Switches it on, for connections that begin from then on, in this network namespace
/// (Documentation/networking/nf_conntrack-sysctl.rst).
const SWITCH: &str = "/proc/sys/net/netfilter/nf_conntrack_acct";

/// The kernel counts the packets and bytes of connections, for as long as this lives.
///
/// Without it the overview of connections has no figures; nothing else needs it. What a connection
/// has counted once it goes on counting.
#[derive(Debug)]
pub struct Counting {
    /// Whether it was off.
    ours: bool,
}

impl Counting {
    /// Switches it on if it is off.
    pub fn begin() -> Counting {
        let off = std::fs::read_to_string(SWITCH).is_ok_and(|state| state.trim() == "0");
        Counting {
            ours: off && set("1"),
        }
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        if self.ours {
            set("0");
        }
    }
}

fn set(state: &str) -> bool {
    let written = std::fs::write(Path::new(SWITCH), state);
    if let Err(error) = &written {
        tracing::debug!(%error, "connections are not counted");
    }
    written.is_ok()
}
