//! Where this process stands among those of a run, by the variables that launchers set, and whether rank 0 can be met.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::Duration;

use burn_qlora::qlora_dist::{DistError, Launcher, Place};

use super::Report;
use super::cards::CARDS_VARIABLE;
use crate::train::ranks;

/// How long rank 0's host may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Variables that count beside a launcher's own.
const OTHERS: [&str; 3] = [CARDS_VARIABLE, "QLORA_DIST_TIMEOUT", "RAYON_NUM_THREADS"];
/// What the variables of each launcher begin with.
const PREFIXES: [(&str, &[&str]); 5] = [
    ("torchrun", &["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_", "QLORA_RUN"]),
    ("Kubeflow", &["PET_"]),
    ("Open MPI", &["OMPI_", "PMIX_"]),
    ("Slurm", &["SLURM_"]),
    ("PMI", &["PMI_", "MPI_"]),
];

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// This process's place.
pub fn place() -> Result<Place, DistError> {
    Place::from_env()
}

/// Says what the launcher's variables mean, and tries the way to rank 0.
pub fn inspect(report: &mut Report, place: Result<&Place, &DistError>) {
    report.section("Launcher");
    let place = match place {
        Ok(place) => place,
        Err(error) => {
            counting(report);
            report.problem(error.to_string(), "correct the variables, or unset them for a process that is alone");
            return;
        }
    };
    if place.is_alone() {
        match place.launcher {
            Launcher::Alone => report.ok("none: this process would train alone; --gpus N starts several"),
            launcher => report.ok(format!("{launcher} started this process, which is alone")),
        };
    } else {
        let Place { rank, world_size, local_rank, local_world_size, launcher, .. } = place;
        let local = format!("{local_rank} of {local_world_size} on this host");
        report.ok(format!("rank {rank} of {world_size}, {local}, by {launcher}; rank 0 is at {}", place.address()));
    }
    counting(report);
    others(report, place.launcher, &variable);
    if let Err(error) = ranks::timeouts() {
        report.problem(error.to_string(), "unset it, or write seconds");
    }
    if !place.is_alone() {
        rendezvous(report, place);
    }
}

/// The variables that were looked for and are there.
fn counting(report: &mut Report) {
    let seen = RefCell::new(BTreeMap::new());
    let lookup = |name: &str| {
        let value = variable(name)?;
        seen.borrow_mut().insert(name.to_owned(), value.clone());
        Some(value)
    };
    // The place is known; this is about what was asked for on the way to it.
    let _ = Place::find(&lookup);
    let mut seen = seen.into_inner();
    for name in OTHERS {
        variable(name).map(|value| seen.insert(name.into(), value));
    }
    if !seen.is_empty() {
        let listed: Vec<String> = seen.iter().map(|(name, value)| format!("{name}={value}")).collect();
        report.ok(format!("variables that count: {}", listed.join(" "))).value("variables", serde_json::json!(seen));
    }
}

/// Launchers of whom there are variables too, which do not count.
fn others(report: &mut Report, counts: Launcher, lookup: &dyn Fn(&str) -> Option<String>) {
    for (name, prefixes) in PREFIXES {
        // --gpus sets torchrun's variables.
        if counts.to_string() == name || counts == Launcher::Qlora && name == "torchrun" {
            continue;
        }
        let is_its = |variable: &str| prefixes.iter().any(|prefix| variable.starts_with(prefix));
        let only =
            |variable: &str| if is_its(variable) || variable.starts_with("MASTER_") { lookup(variable) } else { None };
        let found = match Place::find(&only) {
            Ok(place) if place.is_alone() => continue,
            Ok(place) => format!("rank {} of {}", place.rank, place.world_size),
            Err(error) => error.to_string(),
        };
        report.note(format!("{name}'s variables are there too and do not count: {found}"));
    }
    let in_batch = lookup("SLURM_JOB_ID").is_some() && lookup("SLURM_STEP_ID").is_none();
    let tasks = lookup("SLURM_NTASKS").filter(|tasks| tasks.trim() != "1");
    if let (true, Launcher::Alone, Some(tasks)) = (in_batch, counts, tasks) {
        let text = format!("a job of Slurm with {tasks} tasks, outside of srun: this process would train alone");
        report.note(text).cure("start it with srun, as in `srun qlora train CONFIG`");
    }
}

/// Whether rank 0 can listen, or can be reached.
fn rendezvous(report: &mut Report, place: &Place) {
    let (host, port) = (place.master_addr.as_str(), place.master_port);
    let unknown = "MASTER_ADDR must name rank 0's host so that every host finds it; try its address";
    let addresses: Vec<SocketAddr> = match (host, port).to_socket_addrs() {
        Ok(addresses) => addresses.collect(),
        Err(error) => {
            report.problem(format!("{host}, rank 0's host, can't be resolved: {error}"), unknown);
            return;
        }
    };
    if place.is_first() {
        listening(report, place, &addresses);
        return;
    }
    let mut last = None;
    for address in &addresses {
        match TcpStream::connect_timeout(address, PATIENCE) {
            Ok(_) => {
                report.note(format!("somebody listens at {address}: rank 0 of a run that begins, or something else"));
                return;
            }
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                report.ok(format!("{address} answers, and the port is free, as it should be before a run"));
                return;
            }
            Err(error) => last = Some(error),
        }
    }
    let why = last.map_or("it has no address".into(), |error| error.to_string());
    let cure = "see whether the hosts reach each other (ping), whether a firewall keeps the port, and whether MASTER_ADDR is an address of \
                the network between them";
    report.problem(format!("{} can't be reached: {why}", place.address()), cure);
}

fn listening(report: &mut Report, place: &Place, addresses: &[SocketAddr]) {
    let port = place.master_port;
    // Ranks of other hosts come to any address of this one.
    let any =
        if addresses.iter().any(SocketAddr::is_ipv6) { IpAddr::from([0_u16; 8]) } else { IpAddr::from([0_u8; 4]) };
    match TcpListener::bind((any, port)) {
        Ok(_) => drop(report.ok(format!("port {port} is free for rank 0, which is this process")).value("port", port)),
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            let cure = "set MASTER_PORT to one that is free, for all ranks; or a run of yours is under way here";
            report.problem(format!("port {port}, where rank 0 would listen, is in use"), cure);
        }
        Err(error) => {
            let cure = "set MASTER_PORT to one from 1024 to 65535, for all ranks";
            report.problem(format!("rank 0 can't listen on port {port}: {error}"), cure);
        }
    }
    let is_here = |address: &SocketAddr| TcpListener::bind((address.ip(), 0)).is_ok();
    if !addresses.iter().any(is_here) {
        let text = format!("{} is no address of this host, which has rank 0", place.master_addr);
        report.note(text).cure("fine where the network forwards it; else MASTER_ADDR must name this host");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn told(counts: Launcher, pairs: &[(&str, &str)]) -> String {
        let mut report = Report::default();
        let lookup = |name: &str| pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_string());
        others(&mut report, counts, &lookup);
        report.to_string()
    }

    #[test]
    fn variables_of_other_launchers_are_told() {
        let slurm = [
            ("SLURM_STEP_ID", "0"),
            ("SLURM_JOB_ID", "7"),
            ("SLURM_PROCID", "1"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_JOB_NODELIST", "a"),
        ];
        assert!(
            told(Launcher::OpenMpi, &slurm).contains("Slurm's variables are there too and do not count: rank 1 of 4")
        );
        assert!(!told(Launcher::Slurm, &slurm).contains("Slurm"));
        let batch = told(Launcher::Alone, &[("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "16")]);
        assert!(batch.contains("16 tasks, outside of srun") && batch.contains("start it with srun"), "{batch}");
        let broken = told(Launcher::Torchrun, &[("PMI_SIZE", "2")]);
        assert!(broken.contains("PMI's variables are there too") && broken.contains("PMI_RANK"), "{broken}");
        assert!(!told(Launcher::Qlora, &[("RANK", "0"), ("WORLD_SIZE", "2"), ("QLORA_RUN", "x")]).contains("torchrun"));
    }

    #[test]
    fn the_way_to_rank_0_is_tried() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let told = |rank, host: &str| {
            let mut report = Report::default();
            let place = Place { rank, world_size: 2, master_addr: host.into(), master_port: port, ..Place::alone() };
            rendezvous(&mut report, &place);
            (report.problems(), report.to_string())
        };
        let (problems, text) = told(0, "127.0.0.1");
        assert!(
            problems == 1 && text.contains(&format!("port {port}, where rank 0 would listen, is in use")),
            "{text}"
        );
        let (problems, text) = told(1, "127.0.0.1");
        assert!(problems == 0 && text.contains("somebody listens"), "{text}");
        drop(listener);
        let (problems, text) = told(1, "127.0.0.1");
        assert!(problems == 0 && text.contains("answers, and the port is free"), "{text}");
        let (problems, text) = told(0, "127.0.0.1");
        assert!(problems == 0 && text.contains("is free for rank 0"), "{text}");
        let (problems, text) = told(1, "no-such-host.invalid");
        assert!(problems == 1 && text.contains("can't be resolved"), "{text}");
    }
}
