//! CRIU's configuration files, as far as livemig has to know what is in them.
//!
//! CRIU reads `/etc/criu/default.conf` first. The runtimes then hand it a second file,
//! `/etc/criu/runc.conf` (crun ≥ 1.26 with libcriu ≥ 4.2: `crun.conf`, else `runc.conf` too). The
//! option `network-lock` works in the first and **crashes** CRIU 3.17 to 4.2 in the second.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Longer files are not read to their end: CRIU's own are a few lines.
const MAX: u64 = 64 << 10;

/// How CRIU keeps packets away from a container while it takes its sockets apart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkLock {
    /// What `default.conf` says: `iptables`, `nftables` or `skip`. Without a word from it CRIU
    /// uses what it was built with, which is iptables unless a distribution changed it.
    pub configured: Option<String>,
    /// Files that must not have the option but do.
    pub misplaced: Vec<PathBuf>,
    /// Whether `iptables-restore`, which the default needs, is installed.
    pub iptables: bool,
}

impl NetworkLock {
    /// Reads the configuration below `etc`, which is `/etc/criu` but in tests. Files that are not
    /// there or cannot be read say nothing.
    pub(super) fn read(etc: &Path, iptables: bool) -> NetworkLock {
        let value = |name: &str| {
            let options = options(&text(&etc.join(name)));
            options
                .into_iter()
                .rev()
                .find(|(key, _)| key == "network-lock")
                .map(|(_, value)| value)
        };
        NetworkLock {
            configured: value("default.conf").filter(|value| !value.is_empty()),
            misplaced: ["runc.conf", "crun.conf"]
                .into_iter()
                .filter(|name| value(name).is_some())
                .map(|name| etc.join(name))
                .collect(),
            iptables,
        }
    }
}

fn text(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = std::fs::File::open(path) {
        // A file that breaks off has said what it said.
        let _ = file.take(MAX).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The options of a file in order, each with its value or nothing.
///
/// One option a line, `#` begins a comment, the value stands behind a blank or `=` and may be
/// quoted (`parse_statement` in CRIU's `criu/config.c`).
fn options(text: &str) -> Vec<(String, String)> {
    let mut options = Vec::new();
    for line in text.lines() {
        let line = line.trim_start();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let end = line.find([' ', '\t', '=']).unwrap_or(line.len());
        let value = line[end..].trim_start_matches([' ', '\t', '=']);
        let value = match value.strip_prefix('"') {
            Some(quoted) => quoted.split('"').next().unwrap_or_default(),
            None => value.split('#').next().unwrap_or_default().trim_end(),
        };
        options.push((line[..end].to_owned(), value.to_owned()));
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_as_criu_reads_them() {
        let text = "# comment\n\n  tcp-close\nnetwork-lock nftables # why\nmanage-cgroups=ignore\n\
                    lsm-profile \"selinux:a b\"\n\tverbosity\t4\n";
        let expected = [
            ("tcp-close", ""),
            ("network-lock", "nftables"),
            ("manage-cgroups", "ignore"),
            ("lsm-profile", "selinux:a b"),
            ("verbosity", "4"),
        ];
        let expected = expected.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(options(text), expected);
    }

    #[test]
    fn the_lock_is_found_where_it_is() {
        let etc = tempfile::tempdir().expect("a directory");
        assert_eq!(NetworkLock::read(etc.path(), false), NetworkLock::default());
        std::fs::write(
            etc.path().join("default.conf"),
            "network-lock skip\nnetwork-lock nftables\n",
        )
        .expect("written");
        std::fs::write(
            etc.path().join("runc.conf"),
            "tcp-close\n#network-lock skip\n",
        )
        .expect("written");
        std::fs::write(etc.path().join("crun.conf"), "network-lock=skip\n").expect("written");
        let lock = NetworkLock::read(etc.path(), true);
        assert_eq!(lock.configured.as_deref(), Some("nftables"));
        assert_eq!(lock.misplaced, [etc.path().join("crun.conf")]);
    }
}
