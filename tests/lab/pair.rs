//! Hosts that trust each other and run agents: where a migration can begin.
//!
//! ```ignore
//! let pair = Pair::up().await;
//! pair.host(1).run_workload("web", &["-p", "7000:7000"], &["echo", "7000"]).await;
//! let report = pair.migrate("web", 1, 2).await;
//! pair.assert_moved("web", 1, 2, &report).await;
//! ```

use serde_json::Value;

use super::{Builder, Census, Lab, Node, Output, Process};

/// The phases of a migration, in the order in which every report has them.
pub const PHASES: [&str; 9] = [
    "preflight",
    "prepare",
    "precopy",
    "hold",
    "freeze",
    "transfer",
    "restore",
    "steer",
    "commit",
];

/// Two hosts, or more, each with a running agent, each joined with each. Taken down when dropped.
#[derive(Debug)]
pub struct Pair {
    // Before the lab: they end before it does.
    agents: Agents,
    lab: Lab,
    verbose: Option<&'static str>,
}

impl Pair {
    /// Two hosts and a client, as the lab has them by default.
    pub async fn up() -> Pair {
        Pair::of(Lab::builder(2)).await
    }

    /// The hosts of a lab that is unlike the default.
    pub async fn of(lab: Builder) -> Pair {
        Pair::join(lab.up().await, None, |_, _| true).await
    }

    /// Hosts of which each knows only those next to it.
    pub async fn chained(lab: Builder) -> Pair {
        Pair::join(lab.up().await, None, |one, other| one.abs_diff(other) == 1).await
    }

    /// The same, with agents and migrations that log at this level (`-v`, `-vv`, `-vvv`).
    pub async fn verbose(lab: Builder, level: &'static str) -> Pair {
        Pair::join(lab.up().await, Some(level), |_, _| true).await
    }

    /// Hosts that have no way to each other but IPv6. Clients reach them by both families.
    pub async fn over_ipv6(lab: Builder) -> Pair {
        let lab = lab.up().await;
        for host in &lab.hosts {
            for other in lab.hosts.iter().filter(|other| other.name != host.name) {
                host.exec(&["ip", "route", "add", "unreachable", &other.ip()])
                    .await;
            }
        }
        Pair::join_at(lab, None, |_, _| true, |host| host.address6().to_string()).await
    }

    async fn join(
        lab: Lab,
        verbose: Option<&'static str>,
        know_each_other: fn(usize, usize) -> bool,
    ) -> Pair {
        Pair::join_at(lab, verbose, know_each_other, Node::ip).await
    }

    async fn join_at(
        lab: Lab,
        verbose: Option<&'static str>,
        know_each_other: fn(usize, usize) -> bool,
        address: fn(&Node) -> String,
    ) -> Pair {
        let mut pair = Pair {
            agents: Agents(Vec::new()),
            lab,
            verbose,
        };
        // Also a whole run of the tests can be made with the other engine.
        if std::env::var("LIVEMIG_TEST_ENGINE").as_deref() == Ok("direct") {
            pair.set_up().await;
        }
        let agents = (1..=pair.lab.hosts.len()).map(|host| pair.spawn_agent(host));
        pair.agents = Agents(agents.collect());
        for agent in &pair.agents.0 {
            agent.wait_for("listening on").await;
        }
        let hosts = pair.lab.hosts.clone();
        for (index, inviting) in hosts.iter().enumerate() {
            for (other, joining) in hosts[..index].iter().enumerate() {
                if !know_each_other(index, other) {
                    continue;
                }
                // One token makes both known to each other; the address is for the way back.
                let token = inviting
                    .exec(&["livemig", "invite", "--address", &address(inviting)])
                    .await;
                let (name, own) = (inviting.name(), address(joining));
                joining
                    .exec(&[
                        "livemig",
                        "join",
                        token.text(),
                        "--name",
                        name,
                        "--address",
                        &own,
                    ])
                    .await;
            }
        }
        pair
    }

    /// Hosts that are set up for the direct engine.
    pub async fn direct(lab: Builder) -> Pair {
        let pair = Pair::of(lab).await;
        pair.set_up().await;
        pair
    }

    async fn set_up(&self) {
        for host in &self.lab.hosts {
            host.exec(&["livemig", "setup"]).await;
            host.podman_service("restart").await;
        }
    }

    fn spawn_agent(&self, host: usize) -> Process {
        // What containers of tests have that others may not.
        let mut command = vec!["livemig", "agent", "--allow", "secrets,unconfined"];
        command.extend(["--allow-bind", "/srv"]);
        command.extend(self.verbose);
        let log = [("LIVEMIG_LOG", "livemig=debug")];
        self.host(host).spawn_with(&command, &log)
    }

    /// The lab around the hosts.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// A host. They are numbered from 1.
    pub fn host(&self, number: usize) -> &Node {
        self.lab.host(number)
    }

    /// A client. They are numbered from 1.
    pub fn client(&self, number: usize) -> &Node {
        self.lab.client(number)
    }

    /// A host's agent.
    pub fn agent(&self, host: usize) -> &Process {
        &self.agents.0[host - 1]
    }

    /// Ends a host's agent with SIGKILL, and starts another one.
    pub async fn replace_agent(&mut self, host: usize) {
        self.agents.0.remove(host - 1).kill().await;
        let new = self.spawn_agent(host);
        new.wait_for("listening on").await;
        self.agents.0.insert(host - 1, new);
    }

    /// Starts `livemig migrate --json`, with more arguments if there are any.
    pub fn spawn_migration(&self, name: &str, from: usize, to: usize, more: &[&str]) -> Process {
        self.spawn_migration_with(name, from, to, more, &[])
    }

    /// The same, with variables.
    pub fn spawn_migration_with(
        &self,
        name: &str,
        from: usize,
        to: usize,
        more: &[&str],
        variables: &[(&str, &str)],
    ) -> Process {
        let destination = self.host(to).name();
        let mut command = vec!["livemig", "--json"];
        command.extend(self.verbose);
        command.extend(["migrate", name, "--to", destination]);
        command.extend(more);
        let mut environment = vec![("LIVEMIG_LOG", "livemig=debug")];
        environment.extend(variables);
        self.host(from).spawn_with(&command, &environment)
    }

    /// Runs a migration that may fail.
    pub async fn try_migrate(&self, name: &str, from: usize, to: usize, more: &[&str]) -> Output {
        self.spawn_migration(name, from, to, more).finish().await
    }

    /// Moves a container, and returns the report. Panics when that fails.
    #[track_caller]
    pub fn migrate<'a>(
        &'a self,
        name: &'a str,
        from: usize,
        to: usize,
    ) -> impl Future<Output = Value> + 'a {
        let caller = std::panic::Location::caller();
        async move {
            let output = self.try_migrate(name, from, to, &[]).await;
            assert!(output.status.success(), "at {caller}: {output}");
            report(&output)
        }
    }

    /// Panics unless the container runs at the destination and nowhere else, with its connections'
    /// report whole.
    pub async fn assert_moved(&self, name: &str, from: usize, to: usize, report: &Value) {
        assert_eq!(
            self.host(to).container_state(name).await.as_deref(),
            Some("running"),
            "{name} at the destination"
        );
        assert_eq!(
            self.host(from).container_state(name).await,
            None,
            "{name} at the source"
        );
        assert_eq!(report["name"], name, "{report}");
        assert_eq!(report["destination"], self.host(to).name(), "{report}");
        let phases: Vec<&str> = report["phases"]
            .as_array()
            .expect("phases are a list")
            .iter()
            .filter(|phase| phase["ms"].is_number())
            .filter_map(|phase| phase["name"].as_str())
            .collect();
        assert_eq!(phases, PHASES, "{report}");
        assert_eq!(report["leftovers"], serde_json::json!([]), "{report}");
        assert!(report["downtime_ms"].as_f64() > Some(0.0), "{report}");
        assert!(report["bytes_sent"].as_u64() > Some(0), "{report}");
    }

    /// What a host is like that had a container which was removed: the first one leaves networks and
    /// rules of Podman behind. To be compared with what a migration leaves.
    pub async fn settled(&self, host: usize, podman: &[&str]) -> Census {
        let host = self.host(host);
        host.run_workload("first", podman, &["echo", "6999"]).await;
        host.exec(&["podman", "rm", "-f", "-t", "0", "first"]).await;
        host.census().await
    }

    /// Panics unless what a migration left on its source, beside what was there `before` the
    /// container was, is the hop that its connections need.
    pub async fn assert_only_the_hop_is_left(&self, host: usize, before: &Census, flows: usize) {
        // What of it each section may show. Whatever a section has that is not here is a left-over.
        const OF_A_HOP: [(&str, &str); 9] = [
            ("addresses", "livemig"),
            ("files", "/run/livemig"),
            ("files", "/run/wireguard/livemig"),
            ("links", "livemig"),
            ("listening", "udp "),
            ("processes", "livemig"),
            ("routes", "livemig"),
            ("rules", "lookup 71057"),
            ("sysctls", "/livemig"),
        ];
        // Of a journal that was closed there is no file.
        const EMPTY: [&str; 2] = [
            "/var/lib/livemig/journal",
            "/var/lib/livemig/journal/outgoing",
        ];
        let own = self.host(host);
        let left = |now: &Census| {
            let mut strange = Vec::new();
            for section in now.names() {
                let mut more = now.section(section).to_vec();
                for line in before.section(section) {
                    match more.iter().position(|other| other == line) {
                        Some(at) => drop(more.remove(at)),
                        None => strange.push(format!("{section}: - {line}")),
                    }
                }
                if section == "marks" && more.len() == flows {
                    continue;
                }
                // The table is livemig's own, and checked by name.
                if section == "nft" {
                    let tables = more.iter().filter(|line| line.starts_with("table "));
                    more = tables
                        .filter(|line| !line.contains("livemig"))
                        .cloned()
                        .collect();
                }
                let of_hop = |line: &String| {
                    OF_A_HOP
                        .iter()
                        .any(|(of, text)| *of == section && line.contains(text))
                        || (section == "files" && EMPTY.contains(&line.as_str()))
                };
                more.retain(|line| !of_hop(line));
                strange.extend(more.iter().map(|line| format!("{section}: + {line}")));
            }
            strange
        };
        let mut strange = left(&own.census().await);
        // Podman's own clean-up takes a moment.
        for _ in 0..50 {
            if strange.is_empty() {
                return;
            }
            tokio::time::sleep(super::LOOK * 10).await;
            strange = left(&own.census().await);
        }
        panic!("left on {}:\n{}", own.name(), strange.join("\n"));
    }

    /// Waits until the hop of a host is gone with all that belongs to it, which is some time after
    /// the end of its last connection. Panics when it stays.
    pub async fn wait_until_the_hop_is_gone(&self, host: usize) {
        let own = self.host(host);
        let started = std::time::Instant::now();
        loop {
            let left = own
                .sh("ip -o link | grep -o 'livemig[0-9]*' || true; ip rule | grep 'lookup 71057' || true
                     nft list tables | grep livemig || true; ss -Hlun | grep 5182 || true
                     ls /run/livemig/hops/*.json /run/wireguard/* 2>/dev/null || true")
                .await;
            if left.text().is_empty() {
                return;
            }
            assert!(
                started.elapsed() < super::BOUND / 2,
                "left on {}:\n{left}",
                own.name()
            );
            tokio::time::sleep(super::LOOK * 10).await;
        }
    }

    /// Takes the lab down now, and says so when that fails, which dropping cannot.
    pub async fn down(self) {
        drop(self.agents);
        self.lab.down().await;
    }
}

/// The agents of the hosts, in their order. What they did is shown when a test fails.
#[derive(Debug)]
struct Agents(Vec<Process>);

impl Drop for Agents {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for agent in &self.0 {
                eprintln!(
                    "\n---- {} ----\n{}{}",
                    agent.command,
                    agent.stdout(),
                    agent.stderr()
                );
            }
        }
    }
}

/// Panics unless all the connections of an echo client went on, with nothing wrong.
#[track_caller]
pub fn assert_went_on(report: &Value, connections: u64) {
    assert_eq!(report["connected"], connections, "{report}");
    assert_eq!(report["wrong"], 0, "{report}");
    assert_eq!(report["resets"], 0, "{report}");
    assert_eq!(report["unanswered"], 0, "{report}");
    assert_eq!(report["same_socket"], true, "{report}");
}

/// The report in what `livemig migrate --json` printed: one object a line, the report last.
pub fn report(output: &Output) -> Value {
    let mut events = events(output);
    let last = events.pop().unwrap_or_default();
    assert_eq!(last["event"], "report", "{output}");
    last["report"].clone()
}

/// Everything that `livemig migrate --json` printed.
pub fn events(output: &Output) -> Vec<Value> {
    output
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {output}")))
        .collect()
}
