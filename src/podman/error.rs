//! What can go wrong between livemig and Podman, and what an operator can do about it.
//!
//! Podman answers nearly everything that it will not do with status 500 and one sentence. The
//! sentence is kept whole in [`Error::Refused`]; [`Refusal`] is what it means.

use std::path::PathBuf;
use std::time::Duration;

/// The result of a call to Podman.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed call to Podman.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The API socket could not be connected to.
    #[error("cannot {doing}: no connection to Podman's socket {}: {source}", socket.display())]
    Connect {
        /// What was being done.
        doing: &'static str,
        /// The socket.
        socket: PathBuf,
        /// Why the connection failed.
        source: std::io::Error,
    },
    /// Podman did not answer, or stopped in the middle of an answer, for this long.
    #[error("cannot {doing} {what}: Podman was silent for {} s", after.as_secs_f32())]
    Timeout {
        /// What was being done.
        doing: &'static str,
        /// To what.
        what: String,
        /// How long nothing was heard.
        after: Duration,
    },
    /// The connection broke, or what came over it is not HTTP.
    #[error("cannot {doing} {what}: the connection to Podman failed: {source}")]
    Connection {
        /// What was being done.
        doing: &'static str,
        /// To what.
        what: String,
        /// What the HTTP client says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Podman knows no such container, image, volume or network (status 404).
    #[error("cannot {doing} {what}: {message}")]
    NotFound {
        /// What was being done.
        doing: &'static str,
        /// To what.
        what: String,
        /// Podman's sentence.
        message: String,
    },
    /// Podman answered with an error.
    #[error("cannot {doing} {what}: {message}")]
    Refused {
        /// What was being done.
        doing: &'static str,
        /// To what.
        what: String,
        /// The innermost error, as Podman gives it.
        cause: String,
        /// Podman's sentence; it usually ends with the cause.
        message: String,
        /// The HTTP status.
        status: u16,
    },
    /// An answer was longer than any that Podman is known to give.
    #[error("cannot {doing} {what}: Podman's answer is longer than {limit} bytes")]
    TooLong {
        /// What was being done.
        doing: &'static str,
        /// To what.
        what: String,
        /// The bound, in bytes.
        limit: usize,
    },
    /// An answer could not be understood.
    #[error("cannot {doing} {what}: Podman's answer makes no sense: {reason}")]
    Malformed {
        /// What was being done.
        doing: &'static str,
        /// To what.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The archive that was being sent to Podman ended with an error of its own.
    #[error("cannot {doing} {what}: the archive could not be read to its end: {source}")]
    Archive {
        /// What was being done.
        doing: &'static str,
        /// To what.
        what: String,
        /// What the archive's stream says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A name that cannot be the name of anything in Podman.
    #[error("{name:?} is no name of a {kind}: Podman allows letters, digits and _ . - in it")]
    Name {
        /// Of what: "container", "volume", "network".
        kind: &'static str,
        /// The text.
        name: String,
    },
    /// A text that is not an identifier: 64 hexadecimal digits.
    #[error("{text:?} is no {kind} ID: it has to be 64 hexadecimal digits")]
    Id {
        /// Of what: "container" or "image".
        kind: &'static str,
        /// The text.
        text: String,
    },
}

/// Why Podman refused: what its sentence means.
///
/// Podman gives no codes, so this is read from its words, as versions 4.9 to 5.8 write them. A
/// sentence in other words is [`Refusal::Other`]; nothing but hints may depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Refusal {
    /// The container does not run, or is paused.
    NotRunning,
    /// Another container has the name.
    NameInUse,
    /// A container with this ID exists, perhaps left over from a restore that failed.
    IdInUse,
    /// There is no network of that name.
    NetworkMissing,
    /// The network exists, but the container's address is in none of its subnets.
    AddressOutside,
    /// Another container of this host has the address.
    AddressInUse,
    /// A published port is taken.
    PortInUse,
    /// A named volume exists already.
    VolumeExists,
    /// The image, or the *name* of the image, is missing, and it could not be pulled either.
    ImageMissing,
    /// A secret is missing.
    SecretMissing,
    /// The source of a bind mount is missing.
    BindSourceMissing,
    /// The container depends on others (`--requires`, or it shares a namespace of theirs): Podman
    /// does not export those. It says so only after the dump.
    HasDependencies,
    /// The container is in a pod, and no pod was named to restore it into.
    InPod,
    /// The OCI runtime, most often CRIU below it, failed; the reason is in CRIU's log.
    Runtime,
    /// The archive is not a tar archive, or is cut off.
    BadArchive,
    /// Something else.
    Other,
}

impl Refusal {
    /// Reads Podman's words. The order matters: the more exact words come first.
    fn read(cause: &str, message: &str) -> Refusal {
        const WORDS: &[(&str, Refusal)] = &[
            ("that name is already in use", Refusal::NameInUse),
            ("that id is already in use", Refusal::IdInUse),
            ("network not found", Refusal::NetworkMissing),
            ("not in any subnet", Refusal::AddressOutside),
            ("is already allocated to container", Refusal::AddressInUse),
            ("already allocated", Refusal::AddressInUse),
            ("address already in use", Refusal::PortInUse),
            ("volume with name", Refusal::VolumeExists),
            ("volume already exists", Refusal::VolumeExists),
            ("no such secret", Refusal::SecretMissing),
            ("no secret with name or id", Refusal::SecretMissing),
            ("pinging container registry", Refusal::ImageMissing),
            ("image not known", Refusal::ImageMissing),
            ("initializing source docker://", Refusal::ImageMissing),
            ("short-name", Refusal::ImageMissing),
            ("unpacking of checkpoint archive", Refusal::BadArchive),
            ("containers with dependencies", Refusal::HasDependencies),
            ("cannot restore pod container", Refusal::InPod),
            ("create criu restore mountpoint", Refusal::BindSourceMissing),
            ("crun: stat `", Refusal::BindSourceMissing),
            ("criu failed", Refusal::Runtime),
            ("criu", Refusal::Runtime),
            ("oci runtime", Refusal::Runtime),
            ("is not running", Refusal::NotRunning),
            ("container state improper", Refusal::NotRunning),
            ("template configuration at", Refusal::NotRunning),
            ("statfs", Refusal::BindSourceMissing),
        ];
        let text = format!("{message}\n{cause}").to_lowercase();
        WORDS
            .iter()
            .find(|(words, _)| text.contains(words))
            .map_or(Refusal::Other, |(_, refusal)| *refusal)
    }
}

impl Error {
    /// What Podman's refusal means, if this is one.
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Error::Refused { cause, message, .. } => Some(Refusal::read(cause, message)),
            _ => None,
        }
    }

    /// Whether Podman said that there is no such thing.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Error::NotFound { .. })
    }

    /// Whether Podman said that something still uses it.
    pub fn is_in_use(&self) -> bool {
        matches!(self, Error::Refused { status: 409, .. })
    }

    /// What the operator can do, if there is something.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Error::Connect { socket, source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => format!(
                    "start Podman's API service: `systemctl enable --now podman.socket` \
                     (it has to listen on {})",
                    socket.display()
                ),
                std::io::ErrorKind::PermissionDenied => {
                    "run livemig as root: only root may checkpoint and restore containers".into()
                }
                _ => return None,
            },
            Error::Timeout { .. } => {
                "look at what Podman is doing (`journalctl -u podman`); a container that another \
                 `podman` command works on is locked until that is done"
                    .into()
            }
            Error::NotFound { .. } => return None,
            Error::Name { .. } => "`livemig ps` lists the containers of this host".into(),
            Error::Refused { .. } => match self.refusal()? {
                Refusal::NotRunning => {
                    "only a running container can be moved; `podman unpause` or `podman start` it"
                        .into()
                }
                Refusal::NameInUse => {
                    "rename or remove the container of that name on the destination".into()
                }
                Refusal::IdInUse => {
                    "a container with this ID is on the destination, perhaps left over from an \
                     earlier restore; `podman rm` it there if it does not run"
                        .into()
                }
                Refusal::NetworkMissing => {
                    "create a network of that name with the same subnet on the destination".into()
                }
                Refusal::AddressOutside => {
                    "the destination's network of that name has another subnet; a moved container \
                     keeps its address, so the subnets have to agree"
                        .into()
                }
                Refusal::AddressInUse => {
                    "another container of the destination has this address; stop it, or give one \
                     of the two another address"
                        .into()
                }
                Refusal::PortInUse => {
                    "see what listens there with `ss -tulnp`; if it is `podman` itself, a failed \
                     restore has left the port behind: wait two minutes, or restart podman.service"
                        .into()
                }
                Refusal::VolumeExists => {
                    "a volume of that name is on the destination; remove it if it is not needed"
                        .into()
                }
                Refusal::ImageMissing => {
                    "the destination needs the exact image under the same name: `podman save` and \
                     `podman load` it"
                        .into()
                }
                Refusal::SecretMissing => {
                    "create a secret of the same name on the destination (`podman secret create`)"
                        .into()
                }
                Refusal::HasDependencies | Refusal::InPod => {
                    "only a container that shares nothing with others can be moved; run it \
                     outside of the pod, with namespaces of its own"
                        .into()
                }
                Refusal::BindSourceMissing => {
                    "bind-mounted files are not moved: make the path exist on the destination"
                        .into()
                }
                Refusal::Runtime => {
                    "CRIU's own log, dump.log or restore.log in the container's userdata \
                     directory, has the reason"
                        .into()
                }
                Refusal::BadArchive | Refusal::Other => return None,
            },
            _ => return None,
        };
        Some(hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sentences of Podman 5.8.6, as it gave them.
    #[test]
    fn reads_podmans_sentences() {
        let seen = [
            (
                "that name is already in use",
                "creating container storage: the container name \"p1\" is already in use by 5acd4a95f53d. You have to remove that container to be able to reuse that name: that name is already in use",
                Refusal::NameInUse,
            ),
            (
                "that ID is already in use",
                "creating container storage: that ID is already in use",
                Refusal::IdInUse,
            ),
            (
                "network not found",
                "unable to find network with name or ID net2: network not found",
                Refusal::NetworkMissing,
            ),
            (
                "requested static ip 10.78.0.9 not in any subnet on network net2",
                "requested static ip 10.78.0.9 not in any subnet on network net2",
                Refusal::AddressOutside,
            ),
            (
                "IPAM error: requested ip address 10.78.0.9 is already allocated to container ID 02f3",
                "IPAM error: requested ip address 10.78.0.9 is already allocated to container ID 02f3",
                Refusal::AddressInUse,
            ),
            (
                "address already in use",
                "cannot listen on the TCP port: listen tcp4 :8081: bind: address already in use",
                Refusal::PortInUse,
            ),
            (
                "volume with name vol1 already exists. Use --ignore-volumes to not restore content of volumes",
                "volume with name vol1 already exists. Use --ignore-volumes to not restore content of volumes",
                Refusal::VolumeExists,
            ),
            (
                "connection refused",
                "unable to copy from source docker://localhost/bb:1: initializing source docker://localhost/bb:1: pinging container registry localhost: Get \"https://localhost/v2/\": dial tcp [::1]:443: connect: connection refused",
                Refusal::ImageMissing,
            ),
            (
                "OCI runtime error",
                "runc: criu failed: type RESTORE errno 0: OCI runtime error",
                Refusal::Runtime,
            ),
            (
                "exit status 1",
                "unpacking of checkpoint archive /var/tmp/restore2023561974 failed: unpacking failed (error: exit status 1; output: archive/tar: invalid tar header)",
                Refusal::BadArchive,
            ),
            (
                "container state improper",
                "\"paused\" is not running, cannot checkpoint: container state improper",
                Refusal::NotRunning,
            ),
            (
                "template configuration at /var/lib/containers/storage/overlay-containers/4502/userdata/config.json not found",
                "template configuration at /var/lib/containers/storage/overlay-containers/4502/userdata/config.json not found",
                Refusal::NotRunning,
            ),
            (
                "no such secret",
                "no secret with name or id \"s1\": no such secret",
                Refusal::SecretMissing,
            ),
            (
                "OCI runtime attempted to invoke a command that was not found",
                "runc: create criu restore mountpoint for /bsrc mount: stat /bsrc: no such file or directory: OCI runtime attempted to invoke a command that was not found",
                Refusal::BindSourceMissing,
            ),
            (
                "OCI runtime attempted to invoke a command that was not found",
                "crun: stat `/bsrc`: No such file or directory: OCI runtime attempted to invoke a command that was not found",
                Refusal::BindSourceMissing,
            ),
            (
                "OCI permission denied",
                "crun: (00.001049) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted: OCI permission denied",
                Refusal::Runtime,
            ),
            (
                "cannot export checkpoints of containers with dependencies",
                "cannot export checkpoints of containers with dependencies",
                Refusal::HasDependencies,
            ),
            (
                "cannot restore pod container without --pod",
                "cannot restore pod container without --pod",
                Refusal::InPod,
            ),
            ("something new", "something new", Refusal::Other),
        ];
        for (cause, message, meaning) in seen {
            assert_eq!(Refusal::read(cause, message), meaning, "{message}");
        }
    }

    #[test]
    fn a_missing_socket_has_a_next_step() {
        let error = Error::Connect {
            doing: "inspect",
            socket: "/run/podman/podman.sock".into(),
            source: std::io::Error::from(std::io::ErrorKind::NotFound),
        };
        assert!(error.hint().unwrap().contains("podman.socket"));
        assert!(error.to_string().contains("/run/podman/podman.sock"));
    }
}
