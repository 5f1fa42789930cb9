//! Where a process's cgroup is in the file system.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The kernel's two hierarchies that can freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    /// cgroup v2: `cgroup.freeze`, answered in `cgroup.events`.
    Unified,
    /// The v1 controller `freezer`: `freezer.state`.
    Legacy,
}

/// A mounted cgroup hierarchy.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// The cgroup that is mounted.
    root: PathBuf,
    /// Where it is mounted.
    pub at: PathBuf,
}

impl Mount {
    /// Where a cgroup is to be found, if it is below what is mounted.
    pub fn path(&self, cgroup: &Path, root: &Path) -> Option<PathBuf> {
        // Outside of this cgroup namespace paths climb: they cannot be found from here.
        let below = cgroup.strip_prefix(&self.root).ok()?;
        if below.components().any(|part| part == Component::ParentDir) {
            return None;
        }
        Some(
            root.join(self.at.strip_prefix("/").unwrap_or(&self.at))
                .join(below),
        )
    }
}

/// The mounted hierarchies that can freeze, the one that runtimes and CRIU would use first.
///
/// They go by what is mounted at `/sys/fs/cgroup`: cgroup v2, or else v1's freezer. Where neither
/// is there, a second v2 mount (`/sys/fs/cgroup/unified` of hybrid systems) is still good enough
/// for us.
pub(super) fn hierarchies(mountinfo: &str) -> Vec<(Kind, Mount)> {
    let mut found: Vec<(u8, Kind, Mount)> = Vec::new();
    for line in mountinfo.lines() {
        // proc_pid_mountinfo(5): ID parent device root mount-point options [tags] - type source
        // super-options
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let mut fields = left.split(' ').skip(3);
        let (Some(root), Some(at)) = (fields.next(), fields.next()) else {
            continue;
        };
        let mut right = right.split(' ');
        let kind = right.next();
        let options = right.nth(1).unwrap_or_default();
        let mount = Mount {
            root: unescaped(root),
            at: unescaped(at),
        };
        match kind {
            Some("cgroup2") if mount.at == Path::new("/sys/fs/cgroup") => {
                found.push((0, Kind::Unified, mount));
            }
            Some("cgroup") if options.split(',').any(|o| o == "freezer") => {
                found.push((1, Kind::Legacy, mount));
            }
            Some("cgroup2") => found.push((2, Kind::Unified, mount)),
            _ => {}
        }
    }
    found.sort_by_key(|(rank, ..)| *rank);
    found
        .into_iter()
        .map(|(_, kind, mount)| (kind, mount))
        .collect()
}

/// Blanks and the like are written as a backslash and three octal digits.
fn unescaped(field: &str) -> PathBuf {
    let mut path = String::new();
    let mut parts = field.split('\\');
    path.push_str(parts.next().unwrap_or_default());
    for part in parts {
        match part
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok())
        {
            Some(byte) => {
                path.push(char::from(byte));
                path.push_str(&part[3..]);
            }
            None => {
                path.push('\\');
                path.push_str(part);
            }
        }
    }
    PathBuf::from(path)
}

/// A process's cgroup in the hierarchy, from its `/proc/<pid>/cgroup`.
pub(super) fn own_cgroup(cgroups: &str, kind: Kind) -> Option<&str> {
    cgroups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let right = match kind {
            Kind::Unified => number == "0" && controllers.is_empty(),
            Kind::Legacy => controllers.split(',').any(|c| c == "freezer"),
        };
        right.then_some(path)
    })
}
