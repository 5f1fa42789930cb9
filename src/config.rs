//! Where livemig keeps its things on a host, and the bounds it works within.
//!
//! What is waited for and may take longer on some host than on others has its bound here. Not here is how
//! often something is looked at, and the bound of what this host's own kernel does at once or never
//! (netlink, `nft`, WireGuard's uapi, a file lock that is held for an edit): that stands where it is waited for.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::agent::Limits;
use crate::migration::Policy;
use crate::{conntrack, podman, tunnel};

/// Paths and bounds of livemig on this host.
///
/// The default is what an ordinary rootful Podman on a distribution needs; a test or an unusual host
/// changes single fields.
#[derive(Debug, Clone)]
pub struct Config {
    /// Podman's API socket.
    pub podman_socket: PathBuf,
    /// What outlives a reboot: this host's key, its peers, open invitations, the journal.
    pub state_dir: PathBuf,
    /// What a reboot makes meaningless: hops, locks, files on their way.
    pub run_dir: PathBuf,
    /// The `livemig` program, which hosts userspace tunnel devices in processes of their own.
    pub program: PathBuf,
    /// First UDP port tried for a tunnel; the next free one above it is taken.
    pub tunnel_port: u16,
    /// How many packets may wait in the kernel during one migration. What happens above it says
    /// [`Request::when_full`](crate::Request::when_full).
    pub hold_packets: u32,
    /// How many bytes of packets may wait, headers included; the kernel needs about 1 KiB more for
    /// each.
    pub hold_bytes: u64,
    /// Where a container's memory is kept for as long as it is on its way: a file system in memory.
    pub memory_dir: PathBuf,
    /// What containers may have that come here from other hosts.
    pub arrivals: Policy,
    /// How long the container's sockets may take to run empty before it is frozen. What is not read
    /// by then is lost, and in the report.
    pub drain_timeout: Duration,
    /// How long the destination may take to say that the container runs, from the moment it has
    /// everything.
    pub restore_timeout: Duration,
    /// How long Podman may take, on either host, to do all for a container that needs none of its
    /// processes. Podman itself gives up a restore after 240 s.
    pub shell_timeout: Duration,
    /// How long the destination's Podman is made to wait for a container's processes before they are frozen.
    /// It waits for 240 s for its runtime (`ContainerCreateTimeout` in `libpod/define/config.go`), which the
    /// downtime has to fit into as well.
    pub podman_patience: Duration,
    /// How long freezing the container's processes may take.
    pub freeze_timeout: Duration,
    /// How long the first handshake of a tunnel may take.
    pub handshake_timeout: Duration,
    /// How long the destination may take to unpack an image once it has all of it.
    pub image_timeout: Duration,
    /// How long a destination that may run the container is asked whether it does, or to give it up,
    /// before the migration is called in doubt. A restarted agent answers within seconds.
    pub doubt_timeout: Duration,
    /// How long a destination is asked to give up what it has when the container here does not depend on
    /// the answer.
    pub give_up_timeout: Duration,
    /// How long a prepared migration may hear nothing from its source before the destination undoes it.
    pub forsaken_timeout: Duration,
    /// How long is waited for a checkpoint that nobody wants any more. CRIU must not be interrupted.
    pub checkpoint_timeout: Duration,
    /// How long is waited for a restore that nobody wants any more and that Podman is at work on.
    pub unwanted_restore_timeout: Duration,
    /// How many migrations may be coming to this host at one time.
    pub incoming: usize,
    /// How long Podman may take to notice that its runtime has ended, and a part of CRIU to begin.
    pub runtime_timeout: Duration,
    /// How long processes may take to end that were killed, and the runtime to tidy up after them: those that
    /// a Podman has left that died.
    pub ending_timeout: Duration,
    /// How long an answer of the destination may be late that was given before it forgot the migration.
    pub late_answer_timeout: Duration,
    /// How long packets may be on their way through a tunnel when a container comes home. What comes later
    /// is lost.
    pub in_flight_timeout: Duration,
    /// How long a userspace tunnel may take to be there.
    pub device_timeout: Duration,
    /// How long a host may take for a change of a path before the others give it up, and for how long
    /// connections may come the other way afterwards. Longer than `path_end_timeout`.
    pub path_timeout: Duration,
    /// How long the end of a path is asked whether it has changed when its answer was lost.
    pub path_end_timeout: Duration,
    /// How long Podman's single answers may take.
    pub podman: podman::Timeouts,
    /// What the agent and its callers accept, and how long they wait for each other.
    pub limits: Limits,
}

impl Config {
    /// How tunnels are made on this host.
    pub(crate) fn tunnel_settings(&self) -> tunnel::Settings {
        tunnel::Settings {
            first_port: self.tunnel_port,
            device_timeout: self.device_timeout,
            ..tunnel::Settings::new(self.run_dir.join("hops"), &self.program)
        }
    }

    /// Where the journals of migrations from this host lie.
    pub fn outgoing_dir(&self) -> PathBuf {
        self.state_dir.join("journal/outgoing")
    }

    /// Where the journals of migrations to this host lie.
    pub fn incoming_dir(&self) -> PathBuf {
        self.state_dir.join("journal/incoming")
    }

    /// Where the locks lie that keep two migrations off one container.
    pub fn lock_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Where files wait on their way to the other host. Memory-backed, as `/run` is.
    pub fn staging_dir(&self) -> PathBuf {
        self.run_dir.join("staging")
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            podman_socket: "/run/podman/podman.sock".into(),
            state_dir: "/var/lib/livemig".into(),
            run_dir: "/run/livemig".into(),
            program: program(),
            tunnel_port: tunnel::Settings::FIRST_PORT,
            hold_packets: conntrack::hold::DEFAULT_PACKETS,
            hold_bytes: conntrack::hold::DEFAULT_BYTES,
            memory_dir: "/dev/shm".into(),
            arrivals: Policy::default(),
            drain_timeout: Duration::from_millis(100),
            restore_timeout: Duration::from_secs(300),
            shell_timeout: Duration::from_secs(120),
            podman_patience: Duration::from_secs(180),
            freeze_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            image_timeout: Duration::from_secs(600),
            doubt_timeout: Duration::from_secs(60),
            give_up_timeout: Duration::from_secs(5),
            forsaken_timeout: Duration::from_secs(120),
            checkpoint_timeout: Duration::from_secs(600),
            unwanted_restore_timeout: Duration::from_secs(45),
            incoming: 16,
            runtime_timeout: Duration::from_secs(30),
            ending_timeout: Duration::from_secs(10),
            late_answer_timeout: Duration::from_secs(2),
            in_flight_timeout: Duration::from_millis(500),
            device_timeout: Duration::from_secs(10),
            path_timeout: Duration::from_secs(60),
            path_end_timeout: Duration::from_secs(30),
            podman: podman::Timeouts::default(),
            limits: Limits::default(),
        }
    }
}

/// This very program if it is `livemig`, else the one beside it, else the one in the usual places.
fn program() -> PathBuf {
    const INSTALLED: [&str; 3] = [
        "/usr/local/bin/livemig",
        "/usr/bin/livemig",
        "/root/.cargo/bin/livemig",
    ];
    let this = std::env::current_exe().ok();
    if let Some(this) = &this {
        if this.file_name().is_some_and(|name| name == "livemig") {
            return this.clone();
        }
        let beside = this.with_file_name("livemig");
        if beside.is_file() {
            return beside;
        }
    }
    let installed = INSTALLED.iter().map(Path::new).find(|path| path.is_file());
    installed.unwrap_or(Path::new(INSTALLED[0])).to_owned()
}
