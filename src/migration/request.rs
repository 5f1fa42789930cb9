//! What is asked of a migration.

use tokio_util::sync::CancellationToken;

use super::engine::Engine;
use super::event::Phase;
use crate::{Config, Error};

/// What happens when no more packets can wait: when one of the bounds
/// [`Config::hold_packets`](crate::Config::hold_packets) and
/// [`Config::hold_bytes`](crate::Config::hold_bytes) is reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// The newest packets are dropped, as on any network that is too slow, and the migration goes
    /// on.
    #[default]
    Drop,
    /// The migration is given up, and the container goes on here, unless its peers have heard it at
    /// the destination already.
    GiveUp,
}

/// A container to move, and where to.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Request {
    /// Name or ID of a running container.
    pub container: String,
    /// Name of a host that was joined.
    pub to: String,
    /// Paths and bounds on this host.
    pub config: Config,
    /// Whether the container's named volumes stay on this host as well. Otherwise they are removed
    /// after the move, unless another container uses them.
    pub keep_volumes: bool,
    /// Whether connections that came through this host go on doing so. Otherwise the hosts where they
    /// began send them straight to the destination, and this one can be switched off.
    pub keep_chain: bool,
    /// What happens when no more packets can wait.
    pub when_full: WhenFull,
    /// Whether new connections to the container's published ports at the source go on to it, through
    /// the tunnel, until [`stop_forwarding`](super::stop_forwarding). Otherwise they are refused.
    pub forward_new: bool,
    /// How the processes cross. Otherwise the best way that both hosts are set up for.
    pub engine: Option<Engine>,
    /// Undo everything at the end of this phase, to see how the move would go.
    ///
    /// [`Phase::Restore`] is the last that can be: afterwards peers have heard the copy at the
    /// destination, and could not go on with the container as it was when it was frozen.
    pub rehearse: Option<Phase>,
    /// Cancelled, the migration undoes what it has done and ends with
    /// [`Error::RolledBack`], unless it is past its point of no return.
    pub cancel: CancellationToken,
}

impl Request {
    /// Moves `container` to the host known here as `to`, with the default [`Config`].
    pub fn new(container: impl Into<String>, to: impl Into<String>) -> Request {
        Request {
            container: container.into(),
            to: to.into(),
            config: Config::default(),
            keep_volumes: false,
            forward_new: false,
            keep_chain: false,
            when_full: WhenFull::default(),
            engine: None,
            rehearse: None,
            cancel: CancellationToken::new(),
        }
    }

    /// With other paths and bounds.
    pub fn config(mut self, config: Config) -> Request {
        self.config = config;
        self
    }

    /// Leaving named volumes behind as well, or not.
    pub fn keep_volumes(mut self, keep: bool) -> Request {
        self.keep_volumes = keep;
        self
    }

    /// Whether new connections to the source go on to the container.
    #[must_use]
    pub fn forward_new(mut self, forward: bool) -> Request {
        self.forward_new = forward;
        self
    }

    /// Leaving the paths of older connections as long as they are, or not.
    pub fn keep_chain(mut self, keep: bool) -> Request {
        self.keep_chain = keep;
        self
    }

    /// Dropping packets, or giving up, when no more can wait.
    pub fn when_full(mut self, policy: WhenFull) -> Request {
        self.when_full = policy;
        self
    }

    /// With this engine, or else the best that both hosts have.
    pub fn engine(mut self, engine: Option<Engine>) -> Request {
        self.engine = engine;
        self
    }

    /// Undoing everything at the end of this phase.
    pub fn rehearse(mut self, phase: Option<Phase>) -> Request {
        self.rehearse = phase;
        self
    }

    /// Stopping when this token is cancelled.
    pub fn cancel(mut self, token: CancellationToken) -> Request {
        self.cancel = token;
        self
    }

    /// Why it is given up when no more packets can wait.
    pub(super) fn hold_full(&self) -> Error {
        Error::HoldFull {
            packets: self.config.hold_packets,
            bytes: self.config.hold_bytes,
        }
    }
}
