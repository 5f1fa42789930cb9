//! The one error of the library's front door, and what may be done about it.

use std::path::PathBuf;

use crate::criu::{Finding, Severity};
use crate::migration::{JournalError, Leftover, Phase};
use crate::{agent, bundle, conntrack, criu, netlink, podman, runtime, tunnel};

/// What a library call returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something did not come about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Everything livemig does, from freezing to routing, is root's.
    #[error("livemig has to run as root")]
    NotRoot,
    /// A host that joined this one never said where its own agent is.
    #[error("the address of {0} is not known here")]
    NoAddress(agent::PeerName),
    /// There is no Podman to talk to.
    #[error("Podman's API socket {} is not there", .0.display())]
    NoPodman(PathBuf),
    /// There is no such container.
    #[error("there is no container `{0}` on this host")]
    NoContainer(String),
    /// A check found a reason not to begin.
    #[error("`{container}` cannot move to {destination}: {}", reasons(findings))]
    Refused {
        /// The container.
        container: String,
        /// Where it was to go.
        destination: String,
        /// Everything that was found, warnings included.
        findings: Vec<Finding>,
    },
    /// Somebody else is moving that container.
    #[error("`{container}` is being migrated already, by {holder}")]
    Busy {
        /// The container.
        container: String,
        /// Who holds the lock.
        holder: String,
    },
    /// Whoever called wanted it to stop.
    #[error("interrupted in phase {0}")]
    Interrupted(Phase),
    /// The rehearsal went as far as it was asked to.
    #[error("rehearsed up to the end of phase {0}")]
    Rehearsed(Phase),
    /// The rehearsal was to go further than there is a way back.
    #[error(
        "phase {0} cannot be rehearsed: once packets are let go, peers have heard the container at the destination, and there is no way back"
    )]
    NotRehearsable(Phase),
    /// More packets came than may wait.
    #[error(
        "so much was sent to the container that it did not fit into the {packets} packets and {} MiB that may wait",
        bytes >> 20
    )]
    HoldFull {
        /// How many packets may wait.
        packets: u32,
        /// How many bytes of packets may wait.
        bytes: u64,
    },
    /// It would take too long.
    #[error(
        "so much memory is written to that the container would stand still for {} ms or more, and {} are allowed",
        expected.as_millis(), budget.as_millis()
    )]
    OverBudget {
        /// How long its memory would take.
        expected: std::time::Duration,
        /// How long it may stand still.
        budget: std::time::Duration,
    },
    /// Somebody has made a volume since it was looked at.
    #[error("there is a volume `{0}` here by now")]
    VolumeExists(String),
    /// The destination has made the container, and waits for what does not come.
    #[error(
        "the container's files and memory did not cross in the {} s for which Podman on {peer} can be made to wait for them",
        after.as_secs()
    )]
    OutOfPatience {
        /// The destination's name here.
        peer: String,
        /// How long they had.
        after: std::time::Duration,
    },
    /// A step failed, and what came before it was undone.
    #[error("{}; {}", with_sources(cause.as_ref()), aftermath(leftovers))]
    RolledBack {
        /// Which step failed, and why.
        phase: Phase,
        /// The first thing that went wrong.
        cause: Box<Error>,
        /// What could not be undone.
        leftovers: Vec<Leftover>,
    },
    /// The destination does not say whether it runs the container.
    #[error(
        "{}; {destination} does not say whether it runs the container, so it stays frozen here: \
         it must never run twice", with_sources(cause.as_ref())
    )]
    InDoubt {
        /// The first thing that went wrong.
        cause: Box<Error>,
        /// The host that does not answer.
        destination: String,
    },
    /// As many migrations are coming to this host as may.
    #[error("{limit} migrations are coming here at this moment, and no more may (limit: incoming)")]
    TooManyIncoming {
        /// How many may.
        limit: usize,
    },
    /// The destination has undone what it had prepared: its agent was started anew, or heard nothing for
    /// too long.
    #[error("{0} does not know of the migration any more")]
    Forgotten(String),
    /// A host was to keep a container, and says that it does not run it.
    #[error("{0} says that it does not run the container: it cannot keep it")]
    NotThere(String),
    /// The container ran at the destination, peers may have heard it, and it has ended there.
    #[error(
        "{0} ran the container and does not run it any more, as after a power cut: here it stands frozen as it \
         was when it moved"
    )]
    NoLongerThere(String),
    /// The container could not be saved, for a reason that only CRIU's log tells.
    #[error("{source}; CRIU says: {reason}")]
    Dump {
        /// What Podman, or the runtime, says.
        source: Box<Error>,
        /// The last errors in CRIU's log.
        reason: String,
    },
    /// The container could not be restored, for a reason that only CRIU's log tells.
    #[error("{source}; CRIU says: {reason}")]
    Restore {
        /// What Podman, or the runtime, says.
        source: Box<Error>,
        /// The last errors in CRIU's log.
        reason: String,
    },
    /// A copy of the container could not be removed.
    #[error("container {container} is still here: {reasons}")]
    StillThere {
        /// Which one.
        container: podman::ContainerId,
        /// Why.
        reasons: String,
    },
    /// The destination could not remove all that it had made.
    #[error("left behind on {peer}: {leftovers}")]
    DestinationLeftovers {
        /// Its name.
        peer: String,
        /// What is left there.
        leftovers: String,
    },
    /// The other host says no, or could not do its part.
    #[error("{host} says: {source}")]
    Elsewhere {
        /// Its name here.
        host: String,
        /// What it says.
        source: agent::Error,
    },
    /// The host may not have containers of this one.
    #[error("{0} may not receive containers from this host")]
    MayNotReceive(agent::PeerName),
    /// Connections take the longer way, because its ends do not know each other.
    #[error("{host} is not known here, and {introducer} may not introduce it")]
    NotIntroduced {
        /// Who is not known.
        host: String,
        /// Who spoke of it.
        introducer: String,
    },
    /// There is no tunnel to a host that speaks of connections through one.
    #[error("there is no hop to {0}")]
    NoHop(String),
    /// A host cannot be forgotten: what it runs for this one is not settled.
    #[error("migrations to {host} have not ended ({})", migrations.join(", "))]
    RevokeUnsettled {
        /// The host.
        host: agent::PeerName,
        /// The numbers of the migrations.
        migrations: Vec<String>,
    },
    /// New connections of this container are not carried anywhere.
    #[error("no new connections of `{0}` are carried to another host")]
    NotForwarded(String),
    /// More paths are about to change than this host keeps in mind.
    #[error("{limit} paths are about to change already")]
    TooManyPaths {
        /// How many may be.
        limit: usize,
    },
    /// A path could not be taken back.
    #[error("the path is between two states: {0}")]
    PathLeft(String),
    /// A phase was run without what an earlier one has to leave it.
    #[error("the {0} is missing: phases ran out of order")]
    OutOfOrder(&'static str),
    /// The system gives no random bytes.
    #[error("no random number to be had: {0}")]
    Random(getrandom::Error),
    /// A file or directory of livemig's own.
    #[error("cannot {doing} {}: {source}", path.display())]
    File {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Podman.
    #[error(transparent)]
    Podman(#[from] podman::Error),
    /// CRIU, or the freezer.
    #[error(transparent)]
    Criu(#[from] criu::Error),
    /// The OCI runtime, or what stands in front of it.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// The files and the stream of the container.
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    /// The tunnel.
    #[error(transparent)]
    Tunnel(#[from] tunnel::Error),
    /// The flows.
    #[error(transparent)]
    Conntrack(#[from] conntrack::Error),
    /// The kernel's netlink.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    /// The other host, or the trust in it.
    #[error(transparent)]
    Agent(#[from] agent::Error),
}

/// What an error means for the container and for whoever called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Not foreseen. Nothing had been changed.
    Unexpected,
    /// The call makes no sense.
    Usage,
    /// A check said no; nothing was changed.
    Refused,
    /// The other host does not answer or does not trust this one; nothing was changed.
    Unreachable,
    /// It failed on the way, and everything was undone.
    RolledBack,
    /// It failed on the way, and something could not be undone.
    Leftovers,
    /// It is not known which host runs the container.
    InDoubt,
    /// It was told to stop, and everything was undone.
    Interrupted,
}

/// What CRIU says when it has looked for the kernel's vDSO where it had asked for it, and the kernel had put it
/// elsewhere: once in some hundred restores where it was seen.
const MISPLACED_VDSO: &str = "vdso: Invalid ELF magic";

impl Error {
    /// Whether Podman was asked for something and has not said what came of it.
    pub(crate) fn is_podmans_silence(&self) -> bool {
        match self {
            Error::Podman(error) => !matches!(
                error,
                podman::Error::Refused { .. } | podman::Error::NotFound { .. }
            ),
            Error::Dump { source, .. } => source.is_podmans_silence(),
            _ => false,
        }
    }

    /// What this means for the container and for whoever called.
    pub fn class(&self) -> Class {
        match self {
            Error::NotRoot
            | Error::NoPodman(_)
            | Error::NoAddress(_)
            | Error::NoContainer(_)
            | Error::Refused { .. }
            | Error::NotIntroduced { .. }
            | Error::MayNotReceive(_)
            | Error::NoHop(_)
            | Error::NotThere(_)
            | Error::TooManyIncoming { .. }
            | Error::RevokeUnsettled { .. }
            | Error::NotForwarded(_)
            | Error::TooManyPaths { .. }
            | Error::Busy { .. } => Class::Refused,
            Error::NotRehearsable(_) => Class::Usage,
            Error::Podman(podman::Error::Connect { .. } | podman::Error::Name { .. }) => {
                Class::Refused
            }
            Error::Podman(error) if error.is_not_found() => Class::Refused,
            Error::Agent(
                agent::Error::UnknownPeer { .. }
                | agent::Error::BadName { .. }
                | agent::Error::KeyInUse
                | agent::Error::KeyBeingReplaced,
            ) => Class::Refused,
            Error::Agent(_) | Error::Elsewhere { .. } => Class::Unreachable,
            Error::Interrupted(_) | Error::Rehearsed(_) => Class::Interrupted,
            Error::RolledBack { leftovers, .. } if !leftovers.is_empty() => Class::Leftovers,
            Error::RolledBack { cause, .. } if matches!(**cause, Error::Interrupted(_)) => {
                Class::Interrupted
            }
            Error::RolledBack { .. } => Class::RolledBack,
            Error::InDoubt { .. } | Error::NoLongerThere(_) => Class::InDoubt,
            _ => Class::Unexpected,
        }
    }

    /// What it is in a word that stays the same from version to version, so that scripts can act on
    /// it. The findings of [`Error::Refused`] have codes of their own.
    pub fn code(&self) -> &str {
        match self {
            Error::NotRoot => "not-root",
            Error::NoAddress(_) => "no-address",
            Error::NoPodman(_) | Error::Podman(podman::Error::Connect { .. }) => "no-podman",
            Error::NoContainer(_) => "no-such-container",
            Error::Refused { .. } => "refused",
            Error::NotIntroduced { .. } => "not-introduced",
            Error::MayNotReceive(_) => "may-not-receive",
            Error::NoHop(_) => "no-hop",
            Error::RevokeUnsettled { .. } => "revoke-unsettled",
            Error::NotForwarded(_) => "not-forwarded",
            Error::TooManyPaths { .. } => "too-many-paths",
            Error::Busy { .. } => "busy",
            Error::Interrupted(_) => "interrupted",
            Error::Rehearsed(_) => "rehearsed",
            Error::HoldFull { .. } => "hold-full",
            Error::OverBudget { .. } => "over-budget",
            Error::VolumeExists(_) => "volume-exists",
            Error::OutOfPatience { .. } => "out-of-patience",
            Error::RolledBack { cause, .. } => cause.code(),
            Error::InDoubt { .. } => "in-doubt",
            Error::NotThere(_) => "not-there",
            Error::NoLongerThere(_) => "no-longer-there",
            Error::Forgotten(_) => "forgotten",
            Error::TooManyIncoming { .. } => "too-many-incoming",
            Error::Podman(error) if error.is_not_found() => "not-found",
            Error::Podman(podman::Error::Name { .. })
            | Error::Agent(agent::Error::BadName { .. }) => "bad-name",
            Error::Agent(error) => match error {
                agent::Error::UnknownPeer { .. } => "unknown-host",
                agent::Error::Connect { .. } => "unreachable",
                agent::Error::NotAdmitted { .. } => "not-admitted",
                agent::Error::WrongHost { .. } => "wrong-host",
                agent::Error::KeyInUse => "key-in-use",
                agent::Error::KeyBeingReplaced => "key-being-replaced",
                agent::Error::Protocol { .. } => "protocol-version",
                agent::Error::Refused { code, .. } => code,
                _ => "agent",
            },
            Error::Elsewhere {
                source: agent::Error::Refused { code, .. },
                ..
            } => code,
            Error::Bundle(bundle::Error::Forbidden { .. } | bundle::Error::Entry { .. }) => {
                "not-as-offered"
            }
            Error::Dump { .. } => "dump",
            Error::Restore { .. } => "restore",
            _ => "failed",
        }
    }

    /// What to do next, where there is something to do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::NotRoot => Some("run it again with sudo".to_owned()),
            Error::NoAddress(name) => Some(format!(
                "run `livemig invite` on {name} and `livemig join TOKEN` here"
            )),
            Error::MayNotReceive(name) => {
                Some(format!("allow it: livemig allow {name} send receive"))
            }
            Error::NotIntroduced { host, introducer } => Some(format!(
                "allow it (livemig allow {introducer} send receive introduce), or make {host} known \
                 (livemig invite, livemig join)"
            )),
            Error::RevokeUnsettled { host, .. } => Some(format!(
                "wait for them, or run `livemig recover`; with --now {host} is forgotten at once, and a \
                 container whose whereabouts only {host} knows stays frozen here"
            )),
            Error::NoPodman(_) => Some("start it: systemctl enable --now podman.socket".to_owned()),
            Error::Refused { findings, .. } => {
                let next: Vec<&str> = refusals(findings)
                    .map(|finding| finding.next.as_str())
                    .collect();
                (!next.is_empty()).then(|| next.join("; "))
            }
            Error::NotRehearsable(_) => {
                Some("the last phase that can be rehearsed is restore".to_owned())
            }
            Error::Busy { .. } => Some("wait for it to end, or stop that process".to_owned()),
            Error::OverBudget { .. } => Some(
                "try again when less is written to, allow more with --max-downtime, go on anyway with \
                 --when-over go-on, or use --post-copy"
                    .to_owned(),
            ),
            Error::VolumeExists(_) => {
                Some("remove or rename it at the destination, and try again".to_owned())
            }
            Error::OutOfPatience { .. } => Some(
                "keep what is much in a volume (volumes have all the time they need), try --rounds 0 where it is \
                 memory, or use --engine rest, which knows no such bound"
                    .to_owned(),
            ),
            Error::HoldFull { .. } => Some(
                "try again when less is sent, allow more with --hold-packets and --hold-mib, or let \
                 the newest be dropped with --when-full drop"
                    .to_owned(),
            ),
            Error::RolledBack { cause, .. } => cause.hint(),
            Error::InDoubt { destination, .. } => Some(format!(
                "see to it that {destination} answers, then run `livemig recover` here; if it never will, \
                 decide which host is to have the container: `livemig recover --help`"
            )),
            Error::Forgotten(_) => Some("begin again".to_owned()),
            Error::TooManyIncoming { .. } => Some("wait until one of them has ended".to_owned()),
            Error::NotThere(_) | Error::NoLongerThere(_) => {
                Some("`livemig recover` lets it go on here".to_owned())
            }
            Error::NoContainer(_) => {
                Some("`livemig ps` lists the containers of this host".to_owned())
            }
            Error::Podman(error) => error.hint(),
            Error::Restore { reason, .. } if reason.contains(MISPLACED_VDSO) => Some(
                "try again: CRIU before its pull request 3012 fails at this now and then, wherever the kernel \
                 happens to put a page of its own"
                    .to_owned(),
            ),
            Error::Dump { .. } | Error::Restore { .. } => None,
            Error::Criu(error) => error.hint(),
            Error::Runtime(error) => error.hint(),
            Error::Bundle(error) => error.hint(),
            Error::Tunnel(error) => error.hint(),
            Error::Conntrack(error) => error.hint(),
            Error::Netlink(error) => error.hint(),
            Error::Agent(error) => error.hint(),
            Error::Elsewhere { host, source } => Some(format!("on {host}: {}", source.hint()?)),
            _ => None,
        }
    }

    /// The error with all that it was caused by, in one line.
    pub fn full(&self) -> String {
        with_sources(self)
    }

    /// An error of a call to the host of this name, which is to be named where it is the one that
    /// says no.
    pub(crate) fn of_host(host: &str) -> impl FnOnce(agent::Error) -> Error {
        move |error| match error {
            source @ agent::Error::Refused { .. } => Error::Elsewhere {
                host: host.to_owned(),
                source,
            },
            error => error.into(),
        }
    }

    pub(crate) fn file(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::File {
            doing,
            path,
            source,
        }
    }
}

fn refusals(findings: &[Finding]) -> impl Iterator<Item = &Finding> {
    findings
        .iter()
        .filter(|finding| finding.severity == Severity::Refuse)
}

fn reasons(findings: &[Finding]) -> String {
    let reasons: Vec<&str> = refusals(findings)
        .map(|finding| finding.what.as_str())
        .collect();
    reasons.join("; ")
}

/// An error with all that it was caused by, in one line.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors say their cause themselves.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

fn aftermath(leftovers: &[Leftover]) -> String {
    if leftovers.is_empty() {
        return "everything was undone, and the container runs on here".to_owned();
    }
    let list: Vec<String> = leftovers.iter().map(ToString::to_string).collect();
    format!("what could not be undone: {}", list.join("; "))
}
