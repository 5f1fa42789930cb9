//! What can go wrong between us and the kernel.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

/// The result of talking to the kernel.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the kernel did not do as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket itself failed.
    #[error("cannot {doing}: {source}")]
    Socket {
        /// What was being done: "open a netlink socket", say.
        doing: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The kernel refused a request.
    #[error("the kernel refused to {doing}: {errno}{}", .message.as_deref().map(|m| format!(" ({m})")).unwrap_or_default())]
    Refused {
        /// What was asked.
        doing: &'static str,
        /// The kernel's reason.
        errno: Errno,
        /// What the kernel said beside it, if it said something (its extended acknowledgement).
        message: Option<String>,
    },
    /// The kernel did not answer in time.
    #[error("the kernel gave no answer within {seconds} s when asked to {doing}")]
    Silent {
        /// What was asked.
        doing: &'static str,
        /// How long was waited.
        seconds: u64,
    },
    /// The answer is not in the form that the family's header file describes.
    #[error("cannot understand the kernel's answer when asked to {doing}: {what}")]
    Malformed {
        /// What was asked.
        doing: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A dump was changed under our hands again and again.
    #[error("the kernel's table changed during each of {tries} attempts to {doing}")]
    Inconsistent {
        /// What was asked.
        doing: &'static str,
        /// How often it was tried.
        tries: u32,
    },
    /// A network namespace could not be opened.
    #[error("cannot open the network namespace {}: {source}", path.display())]
    NamespaceOpen {
        /// The file that stands for it.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A network namespace could not be entered.
    #[error("cannot enter the network namespace {}: {source}", path.display())]
    NamespaceEnter {
        /// The file that stands for it.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The thread that was to work in a namespace could not be started or ended in a panic.
    #[error("the thread that works in the network namespace {} {what}", path.display())]
    Thread {
        /// The file that stands for the namespace.
        path: PathBuf,
        /// What happened to it.
        what: &'static str,
    },
}

impl Error {
    /// The kernel's error number, where there is one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Refused { errno, .. } => Some(*errno),
            Error::Socket { source, .. }
            | Error::NamespaceOpen { source, .. }
            | Error::NamespaceEnter { source, .. } => Errno::from_io_error(source),
            _ => None,
        }
    }

    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        match self.errno()? {
            Errno::PERM | Errno::ACCESS => {
                Some("run livemig as root: it needs CAP_NET_ADMIN and CAP_SYS_ADMIN".to_owned())
            }
            Errno::PROTONOSUPPORT | Errno::OPNOTSUPP | Errno::AFNOSUPPORT => Some(
                "this kernel lacks the netlink family: load nf_conntrack_netlink, nfnetlink_queue \
                 and nf_tables (modprobe)"
                    .to_owned(),
            ),
            Errno::NOBUFS => Some(
                "the kernel had more to say than the socket could take: raise net.core.rmem_max"
                    .to_owned(),
            ),
            _ => None,
        }
    }
}
