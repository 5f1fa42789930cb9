//! What a container may be that comes from another host.
//!
//! A host that may send containers here chooses what they are. Most are as confined as any container;
//! some can do on this host what only its root should. Those need the consent of whoever runs this
//! host's agent, given beforehand: to be a peer is not enough.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use crate::criu::{Code, Finding};
use crate::podman::{Container, HostInfo, Mode, Mount};

/// The capabilities that Podman gives every container: `default_capabilities` in containers.conf(5).
pub(super) const DEFAULT_CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Something that arriving containers have only where this host allows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Privilege {
    /// All privileges (`--privileged`), and with them all that follows but bind mounts.
    Privileged,
    /// Capabilities beyond those that Podman gives every container.
    Capabilities,
    /// Devices of this host.
    Devices,
    /// This host's secrets, by their names.
    Secrets,
    /// No seccomp filter, no labels, visible kernel files: `--security-opt`.
    Unconfined,
    /// This host's namespaces for host names and cgroups.
    HostNamespaces,
}

impl Privilege {
    /// All there are.
    pub const ALL: [Privilege; 6] = [
        Privilege::Privileged,
        Privilege::Capabilities,
        Privilege::Devices,
        Privilege::Secrets,
        Privilege::Unconfined,
        Privilege::HostNamespaces,
    ];

    /// The word for it, as `livemig agent --allow` takes it.
    pub const fn word(self) -> &'static str {
        match self {
            Privilege::Privileged => "privileged",
            Privilege::Capabilities => "capabilities",
            Privilege::Devices => "devices",
            Privilege::Secrets => "secrets",
            Privilege::Unconfined => "unconfined",
            Privilege::HostNamespaces => "host-namespaces",
        }
    }
}

impl std::fmt::Display for Privilege {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.word())
    }
}

/// The word is not one for a privilege.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "`{0}` is none of privileged, capabilities, devices, secrets, unconfined and host-namespaces"
)]
pub struct UnknownPrivilege(String);

impl FromStr for Privilege {
    type Err = UnknownPrivilege;

    fn from_str(word: &str) -> Result<Self, UnknownPrivilege> {
        Privilege::ALL
            .into_iter()
            .find(|privilege| privilege.word() == word)
            .ok_or_else(|| UnknownPrivilege(word.to_owned()))
    }
}

/// What containers may have that come to this host. By default nothing that others have not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// What they may have.
    pub allowed: BTreeSet<Privilege>,
    /// The directories of this host at or below which bind mounts may have their sources.
    pub binds: Vec<PathBuf>,
}

impl Policy {
    /// Whether containers may have this here.
    pub fn allows(&self, privilege: Privilege) -> bool {
        self.allowed.contains(&privilege)
    }

    /// Whether a container may have this file or directory of the host mounted.
    ///
    /// Symbolic links are followed first. What does not exist may not be mounted either.
    pub fn allows_bind(&self, source: &Path) -> bool {
        // A path that goes up again need not lead where it seems to.
        if !is_plain(source) {
            return false;
        }
        let Ok(real) = source.canonicalize() else {
            return false;
        };
        self.binds
            .iter()
            .filter_map(|allowed| allowed.canonicalize().ok())
            .any(|allowed| real.starts_with(allowed))
    }
}

/// Whether a path is absolute and goes nowhere but down.
pub(super) fn is_plain(path: &Path) -> bool {
    path.is_absolute()
        && path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

/// Whether a path lies in the directories that this host's Podman has for this container alone.
pub(super) fn is_own(path: &Path, container: &Container, host: &HostInfo) -> bool {
    let run = host
        .run_root
        .join(format!("{}-containers", host.graph_driver))
        .join(container.id.as_str())
        .join("userdata");
    is_plain(path) && (path.starts_with(host.static_dir(&container.id)) || path.starts_with(run))
}

/// The capabilities of a container that Podman does not give every one.
pub(super) fn added(capabilities: &[String]) -> Vec<&str> {
    let all = capabilities.iter().map(String::as_str);
    all.filter(|it| !DEFAULT_CAPABILITIES.contains(it))
        .collect()
}

/// What of a container this host's policy forbids.
pub(crate) fn forbidden(policy: &Policy, container: &Container, host: &HostInfo) -> Vec<Finding> {
    let name = &container.name;
    let mut findings = Vec::new();
    let mut refuse = |code, privilege: Privilege, what: String| {
        if !policy.allows(privilege) {
            let next = format!(
                "if any peer may send such containers: livemig agent --allow {privilege}, there"
            );
            findings.push(Finding::refuse(code, what, next));
        }
    };
    if container.privileged {
        refuse(
            Code::PrivilegedNotAllowed,
            Privilege::Privileged,
            format!("`{name}` is privileged, and the destination takes no such containers"),
        );
    } else {
        let added = added(&container.capabilities);
        if !added.is_empty() {
            refuse(
                Code::CapabilitiesNotAllowed,
                Privilege::Capabilities,
                format!(
                    "`{name}` has capabilities that the destination gives no arriving container ({})",
                    added.join(", ")
                ),
            );
        }
        if !container.devices.is_empty() {
            let paths = container.devices.iter().map(|it| it.host.to_string_lossy());
            refuse(
                Code::DevicesNotAllowed,
                Privilege::Devices,
                format!(
                    "`{name}` has devices of its host ({}), and the destination gives none away",
                    paths.collect::<Vec<_>>().join(", ")
                ),
            );
        }
        let loose: Vec<&str> = container
            .security_options
            .iter()
            .map(String::as_str)
            .filter(|option| !confines(option))
            .collect();
        if !loose.is_empty() {
            refuse(
                Code::UnconfinedNotAllowed,
                Privilege::Unconfined,
                format!(
                    "`{name}` is less confined than the destination wants ({})",
                    loose.join(", ")
                ),
            );
        }
        let shared = [
            ("host name", &container.uts_mode),
            ("cgroup", &container.cgroup_mode),
        ];
        for (kind, mode) in shared {
            if !matches!(mode, Mode::Private | Mode::Shareable) {
                refuse(
                    Code::NamespaceNotAllowed,
                    Privilege::HostNamespaces,
                    format!(
                        "`{name}` has no {kind} namespace of its own, and the destination shares none"
                    ),
                );
            }
        }
    }
    let secrets = container
        .secrets
        .iter()
        .chain(&container.environment_secrets);
    if let Some(first) = secrets.clone().next() {
        refuse(
            Code::SecretNotAllowed,
            Privilege::Secrets,
            format!("`{name}` uses the secret {first}, and the destination gives none away"),
        );
    }
    for mount in &container.mounts {
        let (Mount::Bind {
            source,
            destination,
            ..
        }
        | Mount::Overlay {
            lower: source,
            destination,
            ..
        }) = mount
        else {
            continue;
        };
        // Where nothing is, another finding says so, and there is nothing to give away.
        if is_own(source, container, host)
            || policy.allows_bind(source)
            || (is_plain(source) && !source.exists())
        {
            continue;
        }
        findings.push(Finding::refuse(
            Code::BindNotAllowed,
            format!(
                "{}, mounted on {}, is not among what the destination lets arriving containers mount",
                source.display(),
                destination.display()
            ),
            format!(
                "if any peer may have it: livemig agent --allow-bind {}, there",
                source.display()
            ),
        ));
    }
    findings
}

/// Whether an option takes something away from a container and gives it nothing.
fn confines(option: &str) -> bool {
    let narrows = ["no-new-privileges", "mask=", "mask:"];
    narrows.iter().any(|start| option.starts_with(start)) && !option.ends_with("=false")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_read_back() {
        for privilege in Privilege::ALL {
            assert_eq!(privilege.word().parse::<Privilege>().unwrap(), privilege);
        }
        assert!("root".parse::<Privilege>().is_err());
    }

    #[test]
    fn a_bind_mount_stays_below_what_is_allowed() {
        let host = tempfile::tempdir().unwrap();
        let allowed = host.path().join("allowed");
        let other = host.path().join("other");
        for directory in [&allowed.join("a"), &other] {
            std::fs::create_dir_all(directory).unwrap();
        }
        std::fs::create_dir(host.path().join("allowed-too")).unwrap();
        std::os::unix::fs::symlink(&other, allowed.join("way-out")).unwrap();
        std::os::unix::fs::symlink(allowed.join("a"), other.join("way-in")).unwrap();
        let policy = Policy {
            binds: vec![allowed.clone()],
            ..Policy::default()
        };
        for yes in [allowed.clone(), allowed.join("a"), other.join("way-in")] {
            assert!(policy.allows_bind(&yes), "{}", yes.display());
            assert!(!Policy::default().allows_bind(&yes), "{}", yes.display());
        }
        for no in [
            other,
            allowed.join("way-out"),
            allowed.join("a/../../other"),
            allowed.join("nothing"),
            host.path().join("allowed-too"),
            host.path().to_owned(),
            PathBuf::from("/"),
            PathBuf::from("relative"),
        ] {
            assert!(!policy.allows_bind(&no), "{}", no.display());
        }
    }

    #[test]
    fn options_that_loosen_are_told_from_those_that_tighten() {
        for tight in [
            "no-new-privileges",
            "no-new-privileges:true",
            "mask=/proc/x",
        ] {
            assert!(confines(tight), "{tight}");
        }
        for loose in [
            "seccomp=unconfined",
            "seccomp=/tmp/mine.json",
            "apparmor=unconfined",
            "label=disable",
            "unmask=ALL",
            "proc-opts=hidepid=0",
            "no-new-privileges=false",
        ] {
            assert!(!confines(loose), "{loose}");
        }
    }

    #[test]
    fn only_what_is_beyond_the_default_is_added() {
        let capabilities = ["CAP_CHOWN", "CAP_NET_ADMIN", "CAP_KILL"].map(str::to_owned);
        assert_eq!(added(&capabilities), ["CAP_NET_ADMIN"]);
    }
}
