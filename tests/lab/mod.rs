//! Real hosts for tests: the Rust side of `tests/lab/lab`, which says what a host is.
//!
//! ```ignore
//! let lab = Lab::new(2).await;
//! lab.host(1).run_workload("web", &["-p", "7000:7000"], &["echo", "7000"]).await;
//! let client = lab.client(1).spawn(&["client-echo", "10.77.0.11", "7000"]).await;
//! // ... move it ...
//! let report = client.stop().await;
//! assert_eq!(report["resets"], 0);
//! ```
//!
//! Every lab has an id of its own, so tests can run side by side. It is taken down when it is
//! dropped, also by a panic, and by its leash when the test is killed.

// Each test binary uses its own part of this.
#![allow(dead_code)]

pub mod gate;
pub mod link;
pub mod pair;

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

/// The lab, for the shell.
pub const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/lab");

/// The image that hosts have, unless they are [cold](Builder::cold).
pub const IMAGE: &str = "localhost/workload:latest";

/// The distribution's iperf3, on hosts that are to have it: [`Builder::with`].
pub const IPERF3: &str = "localhost/iperf3:latest";

/// The virtual machines, for the shell.
const MACHINES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vm/vm");

/// Nothing that a test waits for takes this long, unless it hangs.
const BOUND: Duration = Duration::from_secs(120);

/// The same for virtual machines, in which everything takes ten times as long.
const MACHINE_BOUND: Duration = Duration::from_secs(400);

/// How often a state that is waited for is looked at.
pub const LOOK: Duration = Duration::from_millis(20);

/// Hosts and clients on one network. Taken down when dropped.
#[derive(Debug)]
pub struct Lab {
    id: String,
    hosts: Vec<Node>,
    clients: Vec<Node>,
    wan: Node,
}

impl Lab {
    /// A lab of this many hosts, with one client.
    pub async fn new(hosts: usize) -> Lab {
        Lab::builder(hosts).up().await
    }

    /// Two virtual machines, `a` and `b`, as hosts 1 and 2, with one client: `tests/vm/vm` says what they
    /// are. What a [`Node`] can do that goes past its programs (paths, sockets, namespaces) they cannot.
    pub async fn of_machines() -> Lab {
        let mut builder = Lab::builder(0);
        builder.machines = true;
        builder.up().await
    }

    /// A lab that is unlike the default.
    pub fn builder(hosts: usize) -> Builder {
        Builder {
            machines: false,
            hosts,
            clients: 1,
            options: Vec::new(),
            storage_size: None,
            // What was built with this test, unless somebody wants another.
            bin_dir: match std::env::var_os("LIVEMIG_BIN_DIR") {
                Some(directory) => Some(directory.into()),
                None => option_env!("CARGO_BIN_EXE_livemig")
                    .and_then(|path| Path::new(path).parent())
                    .map(PathBuf::from),
            },
        }
    }

    /// The lab's id, for `tests/lab/lab --id`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A host. They are numbered from 1.
    pub fn host(&self, number: usize) -> &Node {
        &self.hosts[number - 1]
    }

    /// A client. They are numbered from 1.
    pub fn client(&self, number: usize) -> &Node {
        &self.clients[number - 1]
    }

    /// The bridge that all are connected to: a place to count packets, or to filter them with
    /// nftables' `bridge` family. A port of it has the name of its node (`h1`).
    pub fn wan(&self) -> &Node {
        &self.wan
    }

    /// Takes the lab down now, and says so when that fails, which dropping cannot.
    pub async fn down(self) {
        let output = Command::new(SCRIPT)
            .args(["--id", &self.id, "down"])
            .output()
            .await
            .expect("the lab's script can be run");
        assert!(
            output.status.success(),
            "lab down: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let run = |arguments: &[&str]| {
            std::process::Command::new(SCRIPT)
                .args(["--id", &self.id])
                .args(arguments)
                .stdin(Stdio::null())
                .output()
        };
        if std::thread::panicking() {
            // The only chance to see what the hosts would have had to say.
            if let Ok(output) = run(&["report"]) {
                eprintln!("{}", String::from_utf8_lossy(&output.stdout));
            }
        }
        if std::env::var_os("LIVEMIG_LAB_KEEP").is_some() {
            eprintln!("LIVEMIG_LAB_KEEP is set: lab {} stays up", self.id);
            return;
        }
        // A second panic would end the process and hide the first.
        match run(&["down"]) {
            Ok(output) if output.status.success() => {}
            other => eprintln!("lab {} could not be taken down: {other:?}", self.id),
        }
    }
}

/// What a lab is to be like.
#[derive(Debug)]
#[must_use]
pub struct Builder {
    machines: bool,
    hosts: usize,
    clients: usize,
    options: Vec<String>,
    storage_size: Option<&'static str>,
    bin_dir: Option<PathBuf>,
}

impl Builder {
    /// How many clients. Default: 1.
    pub fn clients(mut self, clients: usize) -> Builder {
        self.clients = clients;
        self
    }

    /// The OCI runtime of all hosts: `runc`, the default, or `crun`.
    pub fn runtime(self, name: &str) -> Builder {
        self.option(&["--runtime", name])
    }

    /// The OCI runtime of one host.
    pub fn host_runtime(self, host: usize, name: &str) -> Builder {
        self.option(&["--runtime", &format!("h{host}={name}")])
    }

    /// This host does not have the workload's image.
    pub fn cold(self, host: usize) -> Builder {
        self.option(&["--cold", &format!("h{host}")])
    }

    /// Containers' storage and `/var/tmp` below this directory instead of in memory.
    pub fn storage(self, directory: &Path) -> Builder {
        self.option(&["--storage", &directory.to_string_lossy()])
    }

    /// The bound of each host's two file systems in memory, as mount(8) wants it.
    pub fn storage_size(mut self, size: &'static str) -> Builder {
        self.storage_size = Some(size);
        self
    }

    /// The MTU of every link, in bytes.
    pub fn mtu(self, mtu: u32) -> Builder {
        self.option(&["--mtu", &mtu.to_string()])
    }

    /// Hosts drop what conntrack calls invalid.
    pub fn firewall(self) -> Builder {
        self.option(&["--firewall"])
    }

    /// Hosts have the image `localhost/PROGRAM:latest` too, one of those of `tests/lab/programs.sh`.
    pub fn with(self, program: &str) -> Builder {
        self.option(&["--with", program])
    }

    fn option(mut self, option: &[&str]) -> Builder {
        self.options
            .extend(option.iter().map(|word| (*word).to_owned()));
        self
    }

    /// Starts it. Panics, with what the script said, when it cannot.
    pub async fn up(self) -> Lab {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let own = std::process::id();
        let id = format!("t{own}-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let mut command = Command::new(if self.machines { MACHINES } else { SCRIPT });
        command.args(["--id", &id, "up"]);
        if !self.machines {
            command.args([self.hosts.to_string(), self.clients.to_string()]);
        }
        command
            .args(&self.options)
            .args(["--leash", &own.to_string()])
            .stdin(Stdio::null());
        if let Some(directory) = &self.bin_dir {
            command.env("LIVEMIG_BIN_DIR", directory);
        }
        if let Some(size) = self.storage_size {
            command.env("LIVEMIG_LAB_STORAGE_SIZE", size);
        }
        // From here on it is dropped, whatever happens.
        let node = |name: String, last: usize, bound: Duration| Node {
            lab: id.clone(),
            name,
            address: Ipv4Addr::new(10, 77, 0, u8::try_from(last).expect("few enough nodes")),
            // The address's last group is the decimal number as it is written.
            address6: format!("fd77::{last}")
                .parse()
                .expect("an address by construction"),
            bound,
        };
        let machines = [("a", 51), ("b", 52)];
        let lab = Lab {
            hosts: if self.machines {
                machines
                    .map(|(name, last)| node(name.to_owned(), last, MACHINE_BOUND))
                    .into()
            } else {
                (1..=self.hosts)
                    .map(|n| node(format!("h{n}"), 10 + n, BOUND))
                    .collect()
            },
            clients: (1..=self.clients)
                .map(|n| node(format!("c{n}"), 100 + n, BOUND))
                .collect(),
            wan: node("wan".to_owned(), 1, BOUND),
            id,
        };
        let output = command.output().await.expect("the lab's script can be run");
        assert!(
            output.status.success(),
            "lab up: {}\n(as root? `tests/lab/lab prepare` done?)",
            String::from_utf8_lossy(&output.stderr)
        );
        lab
    }
}

/// A host or a client of a lab.
#[derive(Debug, Clone)]
pub struct Node {
    lab: String,
    name: String,
    address: Ipv4Addr,
    address6: Ipv6Addr,
    bound: Duration,
}

impl Node {
    /// `h1`, `c1`: also a name that every host resolves.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the network between the hosts.
    pub fn address(&self) -> IpAddr {
        self.address.into()
    }

    /// The same for IPv6.
    pub fn address6(&self) -> IpAddr {
        self.address6.into()
    }

    /// Its address as the text that programs want.
    pub fn ip(&self) -> String {
        self.address.to_string()
    }

    /// The process that is the host's PID 1, or holds the client's namespace, as this test sees it.
    pub fn pid(&self) -> u32 {
        let file = format!("/run/livemig-lab/{}/{}.pid", self.lab, self.name);
        std::fs::read_to_string(&file)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or_else(|| panic!("{file} has no process id: is the lab up?"))
    }

    /// A path inside the host, as this test can open it.
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.pid()))
    }

    /// Podman's API socket, as this test can connect to it.
    pub fn podman_socket(&self) -> PathBuf {
        self.path("/run/podman/podman.sock")
    }

    /// The directory of the cgroup in which the host's memory is counted, containers included.
    pub async fn memory_cgroup(&self) -> PathBuf {
        let output = Command::new(SCRIPT)
            .args(["--id", &self.lab, "memory", &self.name])
            .output()
            .await
            .expect("the lab's script can be run");
        assert!(output.status.success(), "{}: no cgroup", self.name);
        PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
    }

    /// The network namespace, as this test can enter it.
    pub fn network_namespace(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.pid()))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(SCRIPT);
        command
            .args(["--id", &self.lab, "exec", &self.name])
            .args(arguments)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    /// Runs a command there to its end. Panics when it fails, with all that it said.
    #[track_caller]
    pub fn exec(&self, arguments: &[&str]) -> impl Future<Output = Output> + use<> {
        // A future's panic would name this file.
        let caller = std::panic::Location::caller();
        let run = self.try_exec(arguments);
        async move {
            let output = run.await;
            assert!(output.status.success(), "at {caller}: {output}");
            output
        }
    }

    /// The same, for a command that may fail.
    pub fn try_exec(&self, arguments: &[&str]) -> impl Future<Output = Output> + use<> {
        let mut command = self.command(arguments);
        let said = format!("{}: {}", self.name, arguments.join(" "));
        let bound = self.bound;
        async move {
            let output = tokio::time::timeout(bound, command.output())
                .await
                .unwrap_or_else(|_| panic!("{said}: still running after {bound:?}"))
                .unwrap_or_else(|error| panic!("{said}: {error}"));
            Output {
                command: said,
                stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
                stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
                status: output.status,
            }
        }
    }

    /// Runs a line of shell there.
    #[track_caller]
    pub fn sh(&self, script: &str) -> impl Future<Output = Output> + use<> {
        self.exec(&["sh", "-ec", script])
    }

    /// Starts a command there that goes on while the test does other things.
    pub fn spawn_command(&self, arguments: &[&str]) -> Process {
        self.spawn_with(arguments, &[])
    }

    /// The same, with variables. Hosts only hear those that begin with `LIVEMIG_` or `RUST_`.
    pub fn spawn_with(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Process {
        let mut command = self.command(arguments);
        command.envs(environment.iter().copied());
        self.start(command, arguments)
    }

    /// Starts a command there that [is told things](Process::tell) as it goes on.
    pub fn spawn_listening(&self, arguments: &[&str]) -> Process {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped());
        self.start(command, arguments)
    }

    fn start(&self, mut command: Command, arguments: &[&str]) -> Process {
        let said = format!("{}: {}", self.name, arguments.join(" "));
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{said}: {error}"));
        let (stdout, stderr) = (Arc::default(), Arc::default());
        let readers = [
            tokio::spawn(collect(child.stdout.take(), Arc::clone(&stdout))),
            tokio::spawn(collect(child.stderr.take(), Arc::clone(&stderr))),
        ];
        Process {
            command: said,
            in_host: self.name.starts_with('h'),
            bound: self.bound,
            child,
            readers,
            stdout,
            stderr,
        }
    }

    /// Starts a client of the workload program, and returns once all its connections work.
    #[track_caller]
    pub fn spawn(&self, arguments: &[&str]) -> impl Future<Output = Workload> + use<> {
        let caller = std::panic::Location::caller();
        let mut all = vec!["workload"];
        all.extend(arguments);
        let process = self.spawn_command(&all);
        async move {
            process.wait_until(caller, "ready").await;
            Workload { process, caller }
        }
    }

    /// Runs a client of the workload program to its end, which its arguments must bring about.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> impl Future<Output = Value> + use<> {
        let mut all = vec!["workload"];
        all.extend(arguments);
        let output = self.exec(&all);
        async move { output.await.json() }
    }

    /// Gives a command to a workload server, and returns its answer.
    #[track_caller]
    pub fn ask(
        &self,
        server: IpAddr,
        port: u16,
        command: &str,
    ) -> impl Future<Output = Value> + use<> {
        let (server, port) = (server.to_string(), port.to_string());
        self.run(&["ask", &server, &port, command])
    }

    /// Starts a container of the workload's image, and returns its id.
    #[track_caller]
    pub fn run_workload(
        &self,
        name: &str,
        podman: &[&str],
        workload: &[&str],
    ) -> impl Future<Output = String> + use<> {
        let mut all = vec!["podman", "run", "-d", "--name", name];
        all.extend(podman);
        all.push(IMAGE);
        all.extend(workload);
        let output = self.exec(&all);
        async move { output.await.stdout.trim().to_owned() }
    }

    /// The state of a container (`running`, `exited`, ...), or nothing when there is none.
    pub async fn container_state(&self, name: &str) -> Option<String> {
        let output = self
            .try_exec(&[
                "podman",
                "inspect",
                "--type",
                "container",
                "-f",
                "{{.State.Status}}",
                name,
            ])
            .await;
        output
            .status
            .success()
            .then(|| output.stdout.trim().to_owned())
    }

    /// What the workload program's `stat` says of a file in a container.
    #[track_caller]
    pub fn file(&self, container: &str, path: &str) -> impl Future<Output = Value> + use<> {
        let output = self.exec(&["podman", "exec", container, "/workload", "stat", path]);
        async move { output.await.json() }
    }

    /// Stops, starts or restarts Podman's API service.
    pub async fn podman_service(&self, action: &str) {
        let output = Command::new(SCRIPT)
            .args(["--id", &self.lab, "service", &self.name, action])
            .stdin(Stdio::null())
            .output()
            .await
            .expect("the lab's script can be run");
        assert!(
            output.status.success(),
            "{} service {action}: {}",
            self.name,
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Ends the host at once, as if its power had failed.
    pub async fn crash(&self) {
        let status = Command::new(SCRIPT)
            .args(["--id", &self.lab, "crash", &self.name])
            .status()
            .await
            .expect("the lab's script can be run");
        assert!(status.success(), "crash {}", self.name);
    }

    /// Ends a virtual machine at once. What it has not written to its disk is lost.
    pub async fn cut_power(&self) {
        self.machine("cut").await;
    }

    /// Starts a virtual machine again whose power was cut, and returns when it has started everything.
    pub async fn restore_power(&self) {
        self.machine("boot").await;
    }

    async fn machine(&self, verb: &str) {
        let output = Command::new(MACHINES)
            .args(["--id", &self.lab, verb, &self.name])
            .stdin(Stdio::null())
            .output();
        let output = tokio::time::timeout(self.bound, output)
            .await
            .unwrap_or_else(|_| panic!("{verb} {}: not through in {:?}", self.name, self.bound))
            .expect("the machines' script can be run");
        assert!(
            output.status.success(),
            "{verb} {}: {}",
            self.name,
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// All that a migration may change on a host, in a form that can be compared.
    pub async fn census(&self) -> Census {
        let output = self.exec(&["sh", "-c", CENSUS]).await;
        Census::parse(&self.name, &output.stdout)
    }

    /// Panics unless the host is as it was, with what differs. Some things take a moment to go (a
    /// process that ends, Podman's own clean-up), so a difference counts once it stays.
    #[track_caller]
    pub fn assert_as_before<'a>(&'a self, before: &'a Census) -> impl Future<Output = ()> + 'a {
        let caller = std::panic::Location::caller();
        async move {
            let deadline = Instant::now() + Duration::from_secs(10);
            loop {
                let now = self.census().await;
                let Some(difference) = before.difference(&now) else {
                    return;
                };
                assert!(
                    Instant::now() < deadline,
                    "at {caller}: {} is not as it was (-: before, +: now):\n{difference}",
                    self.name
                );
                tokio::time::sleep(LOOK * 10).await;
            }
        }
    }
}

/// A command that ended.
#[derive(Debug)]
pub struct Output {
    command: String,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
    /// How it ended.
    pub status: ExitStatus,
}

impl Output {
    /// What it printed, as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in {self}"))
    }

    /// What it printed, without the blanks around it.
    pub fn text(&self) -> &str {
        self.stdout.trim()
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}`: {}\n--- standard output ---\n{}\n--- standard error ---\n{}",
            self.command, self.status, self.stdout, self.stderr
        )
    }
}

type Text = Arc<Mutex<String>>;

async fn collect(from: Option<impl AsyncRead + Unpin>, to: Text) {
    let Some(mut from) = from else { return };
    let mut buffer = [0; 8192];
    while let Ok(count) = from.read(&mut buffer).await {
        if count == 0 {
            break;
        }
        to.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
}

/// A command that goes on. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    command: String,
    in_host: bool,
    bound: Duration,
    child: Child,
    readers: [JoinHandle<()>; 2],
    stdout: Text,
    stderr: Text,
}

impl Process {
    /// What it has printed so far.
    pub fn stdout(&self) -> String {
        self.stdout
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// What it has complained of so far.
    pub fn stderr(&self) -> String {
        self.stderr
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Writes a line to its standard input.
    pub async fn tell(&mut self, line: &str) {
        let input = self.child.stdin.as_mut();
        let input = input.unwrap_or_else(|| panic!("`{}` does not listen", self.command));
        input
            .write_all(format!("{line}\n").as_bytes())
            .await
            .unwrap_or_else(|error| panic!("`{}` was told {line:?}: {error}", self.command));
    }

    /// Waits until it has written this text, to standard output or standard error. Panics when it
    /// ends before that.
    #[track_caller]
    pub fn wait_for<'a>(&'a self, text: &'a str) -> impl Future<Output = ()> + 'a {
        self.wait_until(std::panic::Location::caller(), text)
    }

    async fn wait_until(&self, caller: &std::panic::Location<'_>, text: &str) {
        let started = Instant::now();
        loop {
            // Before looking: what it wrote at its end is read by then.
            let ended = self.readers.iter().all(JoinHandle::is_finished);
            if self.stdout().contains(text) || self.stderr().contains(text) {
                return;
            }
            assert!(
                !ended && started.elapsed() < self.bound,
                "at {caller}: `{}` {} without having written {text:?}\n{}\n{}",
                self.command,
                if ended { "ended" } else { "went on" },
                self.stdout(),
                self.stderr()
            );
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The process itself, as this test sees it.
    pub fn pid(&self) -> Option<u32> {
        let outer = self.child.id()?;
        if !self.in_host {
            return Some(outer);
        }
        // Between it and us stands the one that entered the host's PID namespace for it.
        let children =
            std::fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }

    /// Sends a signal to the process itself. Nothing happens when it is gone.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = self
            .pid()
            .and_then(|pid| rustix::process::Pid::from_raw(i32::try_from(pid).ok()?));
        if let Some(pid) = pid {
            // It may have ended by itself.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    /// Waits until it stands still, by SIGSTOP. Panics when it ends before that.
    #[track_caller]
    pub fn stands_still(&self) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        async move {
            let started = Instant::now();
            loop {
                let ended = self.readers.iter().all(JoinHandle::is_finished);
                if self.pid().is_some_and(|pid| state_of(pid) == Some('T')) {
                    return;
                }
                assert!(
                    !ended && started.elapsed() < self.bound,
                    "at {caller}: `{}` does not stop\n{}\n{}",
                    self.command,
                    self.stdout(),
                    self.stderr()
                );
                tokio::time::sleep(LOOK).await;
            }
        }
    }

    /// Lets it go on after it has stood still.
    pub fn go_on(&self) {
        self.signal(rustix::process::Signal::CONT);
        // The one that entered the host's PID namespace for it stops with it.
        let outer = self.child.id().and_then(|pid| i32::try_from(pid).ok());
        if let Some(outer) = outer.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(outer, rustix::process::Signal::CONT);
        }
    }

    /// Waits for its end.
    pub async fn finish(self) -> Output {
        let bound = self.bound;
        self.finish_within(bound).await
    }

    /// The same, for what may take longer than anything else.
    pub async fn finish_within(mut self, bound: Duration) -> Output {
        let status = tokio::time::timeout(bound, self.child.wait())
            .await
            .unwrap_or_else(|_| panic!("`{}` does not end\n{}", self.command, self.stderr()))
            .unwrap_or_else(|error| panic!("`{}`: {error}", self.command));
        for reader in &mut self.readers {
            // Something that it started may hold the other end open for longer.
            let _ = tokio::time::timeout(Duration::from_secs(2), reader).await;
        }
        Output {
            stdout: self.stdout(),
            stderr: self.stderr(),
            command: self.command,
            status,
        }
    }

    /// Asks it to end (SIGTERM), and waits until it has.
    pub async fn stop(self) -> Output {
        self.signal(rustix::process::Signal::TERM);
        self.finish().await
    }

    /// Kills it (SIGKILL), and waits until it is gone.
    pub async fn kill(self) -> Output {
        self.signal(rustix::process::Signal::KILL);
        self.finish().await
    }
}

/// What a process does: the third field of proc_pid_stat(5).
fn state_of(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// A running client of the workload program.
#[derive(Debug)]
pub struct Workload {
    process: Process,
    caller: &'static std::panic::Location<'static>,
}

impl Workload {
    /// Waits for its end, which its arguments must bring about, and returns its report.
    pub async fn finish(self) -> Value {
        let caller = self.caller;
        let output = self.process.finish().await;
        assert!(output.status.success(), "at {caller}: {output}");
        output.json()
    }

    /// Makes it finish, and returns its report.
    pub async fn stop(self) -> Value {
        self.process.signal(rustix::process::Signal::TERM);
        self.finish().await
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.process.is_running()
    }
}

/// What livemig, Podman or CRIU can leave behind on a host, section by section. Written for the
/// host's own tools, so that what is compared is not seen through livemig's eyes.
const CENSUS: &str = r#"
section() { printf '\n== %s\n' "$1"; }
section nft; nft -s list ruleset
section rules; ip rule; ip -6 rule
section routes; ip route show table all; ip -6 route show table all
section links; ip -j -d link
section addresses; ip -br address
section sysctls; grep -H . /proc/sys/net/ipv4/conf/*/rp_filter /proc/sys/net/ipv4/conf/*/src_valid_mark \
    /proc/sys/net/ipv4/ip_forward /proc/sys/net/netfilter/nf_conntrack_tcp_loose \
    /proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal
section marks; { conntrack -L -f ipv4; conntrack -L -f ipv6; } 2>/dev/null | grep -v 'mark=0 '
section listening; ss -Hltun
section containers; podman ps -a --no-trunc --format '{{.ID}} {{.Names}} {{.State}}'
section volumes; podman volume ls --format '{{.Name}}'
section images; podman image ls -a --no-trunc --format '{{.ID}} {{.Names}}'
section networks; podman network ls --format '{{.Name}}'
section mounts; cut -d' ' -f5 /proc/self/mountinfo
section cgroups; find /sys/fs/cgroup -mindepth 1 -type d
section processes; ps -eo pid=,ppid=,comm= | awk -v me="$$" '$1 != me && $2 != me { print $3 }'
section files; find /tmp /var/tmp /var/lib/livemig /run/livemig /run/wireguard -mindepth 1 2>/dev/null
true
"#;

/// The state of a host at one moment: sections of lines. Two that are equal mean that nothing which
/// matters is different; names that are drawn by lot and things that pass are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census {
    host: String,
    sections: BTreeMap<String, Vec<String>>,
}

impl Census {
    fn parse(host: &str, text: &str) -> Census {
        let mut sections = BTreeMap::<String, Vec<String>>::new();
        for section in text.split("\n== ").skip(1) {
            let (name, body) = section.split_once('\n').unwrap_or((section, ""));
            let mut lines: Vec<String> = match name {
                "links" => normal_links(body),
                _ => body.lines().filter_map(|line| normal(name, line)).collect(),
            };
            // The order of rules matters, that of nothing else.
            if name != "nft" && name != "rules" {
                lines.sort();
            }
            sections.insert(name.to_owned(), lines);
        }
        assert!(
            sections.contains_key("files"),
            "the census of {host} is not whole:\n{text}"
        );
        Census {
            host: host.to_owned(),
            sections,
        }
    }

    /// The lines of one section: `nft`, `rules`, `routes`, `links`, `addresses`, `sysctls`,
    /// `marks`, `listening`, `containers`, `volumes`, `images`, `networks`, `mounts`, `cgroups`,
    /// `processes`, `files`.
    pub fn section(&self, name: &str) -> &[String] {
        self.sections
            .get(name)
            .unwrap_or_else(|| panic!("a census has no section {name}"))
    }

    /// The names of its sections.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.sections.keys().map(String::as_str)
    }

    /// What differs, or nothing when nothing does.
    pub fn difference(&self, other: &Census) -> Option<String> {
        let mut out = String::new();
        for (name, before) in &self.sections {
            let now = other.section(name);
            if before == now {
                continue;
            }
            let _ = writeln!(out, "{name}:");
            let mut counts = HashMap::<&str, i64>::new();
            for line in before {
                *counts.entry(line).or_default() -= 1;
            }
            for line in now {
                *counts.entry(line).or_default() += 1;
            }
            let mut printed = false;
            for (lines, sign) in [(before.as_slice(), -1), (now, 1)] {
                for line in lines {
                    let count = counts.entry(line).or_default();
                    if *count * sign > 0 {
                        *count -= sign;
                        printed = true;
                        let _ = writeln!(out, "  {} {line}", if sign < 0 { '-' } else { '+' });
                    }
                }
            }
            if !printed {
                let _ = writeln!(
                    out,
                    "  the same lines in another order:\n{}",
                    now.join("\n")
                );
            }
        }
        (!out.is_empty()).then_some(out)
    }
}

/// A line of a section as it is compared, or nothing if it is not.
fn normal(section: &str, line: &str) -> Option<String> {
    let line = line.trim_end();
    // Link-local addresses are made from MAC addresses, which Podman draws by lot, and come late.
    if line.is_empty() || line.contains("fe80:") {
        return None;
    }
    let words = line.split_whitespace();
    match section {
        "routes" => {
            if line.contains("dev veth") || line.contains("ff00::/8") {
                return None;
            }
            Some(
                words
                    .filter(|word| *word != "linkdown")
                    .collect::<Vec<_>>()
                    .join(" "),
            )
        }
        "addresses" => {
            // Name, state, addresses; only an interface with addresses says anything.
            let name = line.split(['@', ' ']).next()?;
            let addresses: Vec<&str> = words.skip(2).collect();
            (!addresses.is_empty()).then(|| format!("{name} {}", addresses.join(" ")))
        }
        "sysctls" => (!line.contains("/veth")).then(|| line.to_owned()),
        "marks" => {
            let kept = |word: &str| {
                ["src=", "dst=", "sport=", "dport=", "mark="]
                    .iter()
                    .any(|key| word.starts_with(key))
            };
            let protocol = line.split_whitespace().next()?;
            let kept: Vec<&str> = words.filter(|word| kept(word)).collect();
            Some(format!("{protocol} {}", kept.join(" ")))
        }
        "listening" => {
            let words: Vec<&str> = words.collect();
            Some(format!("{} {}", words.first()?, words.get(4)?))
        }
        "mounts" | "cgroups" | "files" => Some(
            match (
                line.split_once("/netns/netns-"),
                line.split_once("/storage/overlay/"),
            ) {
                (Some((before, _)), _) => format!("{before}/netns/netns-*"),
                (_, Some((before, layer))) if layer.ends_with("/merged") => {
                    format!("{before}/storage/overlay/*/merged")
                }
                _ => line.to_owned(),
            },
        ),
        _ => Some(line.to_owned()),
    }
}

fn normal_links(json: &str) -> Vec<String> {
    let links: Vec<Value> = serde_json::from_str(json.trim())
        .unwrap_or_else(|error| panic!("ip -j link: {error}: {json}"));
    links
        .iter()
        .map(|link| {
            let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
            let name = text(&link["ifname"]);
            format!(
                "{} mtu {} master {} kind {}",
                if name.starts_with("veth") {
                    "veth*"
                } else {
                    &name
                },
                link["mtu"],
                text(&link["master"]),
                text(&link["linkinfo"]["info_kind"]),
            )
        })
        .collect()
}
