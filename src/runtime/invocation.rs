//! The command line with which Podman calls a runtime, as far as livemig has to know it.
//!
//! Podman and its monitor write `RUNTIME [global options] VERB [options] ID` for crun and runc alike
//! (`libpod/oci_conmon_common.go`, `src/conmon.c` of conmon). Only options that livemig changes are
//! looked at; the rest goes on as it came.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::podman::ContainerId;

/// What the runtime is asked to do, as far as livemig cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verb {
    /// Save a container's processes.
    Checkpoint,
    /// Bring a container's processes back.
    Restore,
}

impl std::fmt::Display for Verb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Verb::Checkpoint => "checkpoint",
            Verb::Restore => "restore",
        })
    }
}

/// A call of the runtime that concerns one container's checkpoint or restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invocation {
    /// What to do.
    pub verb: Verb,
    /// With which container.
    pub container: ContainerId,
    /// All arguments, the program's name not among them.
    arguments: Vec<String>,
}

impl Invocation {
    /// Reads the arguments of a call; nothing if it is none of the two.
    pub fn read(arguments: &[String]) -> Option<Invocation> {
        let verb = arguments.iter().find_map(|argument| verb(argument))?;
        // Not there in `checkpoint --help`, with which Podman asks whether there is such a thing.
        let container = arguments.last()?.parse().ok()?;
        Some(Invocation {
            verb,
            container,
            arguments: arguments.to_vec(),
        })
    }

    /// All arguments.
    pub fn arguments(&self) -> &[String] {
        &self.arguments
    }

    /// The value of an option that is written `--name value` or `--name=value`.
    pub fn option(&self, name: &str) -> Option<&str> {
        let mut arguments = self.arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.strip_prefix(name) {
                Some("") => return arguments.next().map(String::as_str),
                Some(rest) if rest.starts_with('=') => return Some(&rest[1..]),
                _ => {}
            }
        }
        None
    }

    /// Where CRIU's images are to be.
    pub fn image_path(&self) -> Option<&Path> {
        self.option("--image-path").map(Path::new)
    }

    /// The same call with another value of an option.
    #[must_use]
    pub fn with_option(self, name: &str, value: &str) -> Invocation {
        let mut call = self.without(name, true);
        let after_verb = call.after_verb();
        let both = [name.to_owned(), value.to_owned()];
        call.arguments.splice(after_verb..after_verb, both);
        call
    }

    /// The same call with an option that has no value.
    #[must_use]
    pub fn with_flag(self, name: &str) -> Invocation {
        let mut call = self.without(name, false);
        let after_verb = call.after_verb();
        call.arguments.insert(after_verb, name.to_owned());
        call
    }

    /// The same call with its images elsewhere.
    #[must_use]
    pub fn with_image_path(self, path: &Path) -> Invocation {
        self.with_option("--image-path", &path.to_string_lossy())
    }

    /// The same call with CRIU's log and statistics elsewhere.
    #[must_use]
    pub fn with_work_path(self, path: &Path) -> Invocation {
        self.with_option("--work-path", &path.to_string_lossy())
    }

    /// The same call with memory left for later. runc would tell CRIU not to, if it is not told itself;
    /// crun says nothing of it to CRIU, which then goes by its own options ([`super::standby`]).
    #[must_use]
    pub fn lazily(self, runtime: &Path) -> Invocation {
        match is_runc(runtime) {
            true => self.with_flag("--lazy-pages"),
            false => self,
        }
    }

    /// Where the runtime writes the number of the container's first process.
    pub fn pid_file(&self) -> Option<PathBuf> {
        self.option("--pid-file").map(PathBuf::from)
    }

    fn after_verb(&self) -> usize {
        let place = self.arguments.iter().position(|a| verb(a).is_some());
        // There is one, or this would not have been made; and what stands first is a global option.
        place.map_or(0, |place| place + 1)
    }

    fn without(mut self, name: &str, has_value: bool) -> Invocation {
        while let Some(place) = self.arguments.iter().position(|argument| {
            let rest = argument.strip_prefix(name);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
        }) {
            let found = self.arguments.remove(place);
            if has_value && found == name && place < self.arguments.len() {
                self.arguments.remove(place);
            }
        }
        self
    }
}

/// Whether this runtime names to CRIU the cgroup that a round of memory freezes. runc does (`Checkpoint` in its
/// `libcontainer/criu_linux.go`). crun does not (`libcrun_container_checkpoint_linux_criu` in its
/// `src/libcrun/criu.c`): its CRIU stops one process after the other, without polling, and would wait for ever
/// for those of a frozen cgroup, which it does not know of.
pub fn names_cgroup_in_rounds(runtime: &Path) -> bool {
    is_runc(runtime)
}

fn is_runc(runtime: &Path) -> bool {
    runtime.ends_with("runc.real") || runtime.ends_with("runc")
}

fn verb(argument: &str) -> Option<Verb> {
    match argument {
        "checkpoint" => Some(Verb::Checkpoint),
        "restore" => Some(Verb::Restore),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "3acb922cdf168ab56da23193fe9cba1f240ee420e6f60b79f2eaf39a506b3a62";

    fn call(text: &str) -> Option<Invocation> {
        let arguments: Vec<String> = text.split(' ').map(str::to_owned).collect();
        Invocation::read(&arguments)
    }

    #[test]
    fn a_checkpoint_is_known_by_its_verb_and_container() {
        let call = call(&format!(
            "--log-format=json checkpoint --image-path /a/b --work-path /a --leave-running {ID}"
        ))
        .unwrap();
        assert_eq!((call.verb, call.container.as_str()), (Verb::Checkpoint, ID));
        assert_eq!(call.image_path(), Some(Path::new("/a/b")));
        assert_eq!(call.option("--log-format"), Some("json"));
        assert_eq!(call.option("--parent-path"), None);
    }

    #[test]
    fn others_are_none() {
        for text in ["checkpoint --help", "state", "--version", "restore x"] {
            assert_eq!(call(text), None, "{text}");
        }
        assert_eq!(call(&format!("start {ID}")), None);
    }

    #[test]
    fn options_are_replaced_however_they_are_written() {
        let call = call(&format!(
            "--log x restore --image-path /a --pid-file=/p --tcp-established {ID}"
        ))
        .unwrap()
        .with_image_path(Path::new("/b"))
        .with_option("--pid-file", "/q")
        .with_flag("--tcp-established")
        .with_flag("--auto-dedup");
        let expected = format!(
            "--log x restore --auto-dedup --tcp-established --pid-file /q --image-path /b {ID}"
        );
        assert_eq!(call.arguments().join(" "), expected);
        assert_eq!(call.pid_file(), Some(PathBuf::from("/q")));
    }
}
