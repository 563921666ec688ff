//! Slurm's variables, of a process that `srun` started.
//!
//! Slurm sets most of them in batch scripts and login shells too, where one process runs in an allocation of many tasks;
//! `SLURM_STEP_ID` is what only `srun` sets. Where the step has names and counts of its own, those of the job do not count: a
//! step may take a part of its job's hosts.

use super::{FIRST_PORT, Launcher, PORTS, Place, Vars, wrong};
use crate::error::DistError;

/// The place of a process of a step.
pub(super) fn place(vars: &Vars<'_>) -> Result<Place, DistError> {
    let first_of = |names: [&'static str; 2]| if vars.has(names[0]) { names[0] } else { names[1] };
    let size = first_of(["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"]);
    // Some versions leave the count out for a step of one task.
    if vars.number(size)?.is_none_or(|tasks| tasks == 1) && vars.number("SLURM_PROCID")? == Some(0) {
        return Ok(Place { launcher: Launcher::Slurm, ..Place::alone() });
    }
    let (rank, world_size) = vars.rank_of("SLURM_PROCID", size)?;
    let tasks = first_of(["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"]);
    let (local_rank, mut local_world_size) = vars.local("SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", world_size)?;
    if let Some(counts) = vars.get(tasks) {
        let node = vars.number("SLURM_NODEID")?.unwrap_or(0);
        let count = tasks_of(&counts, node).filter(|count| (local_rank + 1..=world_size).contains(count));
        let problem = format!(
            "it must hold the tasks of each host, and of this one (SLURM_NODEID {node}) more than {local_rank}"
        );
        local_world_size = count.ok_or_else(|| wrong(tasks, &counts, &problem))?;
    }
    let nodes = first_of(["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"]);
    let master_addr = match (vars.get("MASTER_ADDR"), vars.get(nodes)) {
        (Some(addr), _) => addr,
        (None, Some(list)) => {
            let problem = "it must be a list of hosts such as node[01-03,07],other";
            first_host(&list).ok_or_else(|| wrong(nodes, &list, problem))?
        }
        (None, None) => {
            return Err(DistError::Missing {
                name: nodes.into(),
                because: format!("{size} is {world_size}"),
                cure: "srun sets it; or set MASTER_ADDR to the host of rank 0".into(),
            });
        }
    };
    let job = vars.get("SLURM_JOB_ID").unwrap_or_default();
    let step = vars.get("SLURM_STEP_ID").unwrap_or_default();
    let master_port = match vars.port("MASTER_PORT")? {
        Some(port) => port,
        None => port_of(&job, &step)?,
    };
    let (launcher, run) = (Launcher::Slurm, format!("job {job}, step {step}"));
    Ok(Place { rank, world_size, local_rank, local_world_size, master_addr, master_port, launcher, run })
}

/// A port for a step of a job: neighbours of either get other ports.
fn port_of(job: &str, step: &str) -> Result<u16, DistError> {
    let number = |name: &str, text: &str| {
        text.parse::<u32>().map(u64::from).map_err(|_| wrong(name, text, "it must be a number, or MASTER_PORT be set"))
    };
    let (job, step) = (number("SLURM_JOB_ID", job)?, number("SLURM_STEP_ID", step)?);
    let port = FIRST_PORT + (job * 7 + step) % PORTS;
    u16::try_from(port).map_err(|_| wrong("SLURM_JOB_ID", &job.to_string(), "no port follows from it: set MASTER_PORT"))
}

/// The tasks of a host in counts such as `2(x3),1`: three hosts of two, one of one.
fn tasks_of(counts: &str, node: usize) -> Option<usize> {
    let mut before = 0_usize;
    for part in counts.split(',') {
        let (tasks, hosts) = match part.split_once("(x") {
            Some((tasks, hosts)) => (tasks, hosts.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        before = before.checked_add(hosts)?;
        if node < before {
            return tasks.trim().parse().ok();
        }
    }
    None
}

/// The first host of a list such as `rack1n[01-03,07],other`.
fn first_host(list: &str) -> Option<String> {
    let (mut host, mut rest) = (String::new(), list);
    loop {
        let end = rest.find(['[', ',']).unwrap_or(rest.len());
        let (literal, after) = rest.split_at(end);
        host += literal;
        let Some(inside) = after.strip_prefix('[') else { break };
        let (ranges, after) = inside.split_once(']')?;
        let first = ranges.split([',', '-']).next().filter(|first| !first.is_empty())?;
        host += first;
        rest = after;
    }
    let is_name = |host: &str| host.chars().all(|c| c.is_alphanumeric() || "-._:".contains(c));
    Some(host.trim().to_string()).filter(|host| !host.is_empty() && is_name(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_host_of_a_list() {
        for (list, host) in [
            ("node7", "node7"),
            ("node7,node9", "node7"),
            ("node[01-03,07],other", "node01"),
            ("gpu[07,9-12]-ib", "gpu07-ib"),
            ("rack[2-3]n[010-012]", "rack2n010"),
            ("a.b.example,c[1-2]", "a.b.example"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(host), "{list}");
        }
        for list in ["", ",", "node[", "node[]", "node[-3]", "no de", "n]x"] {
            assert_eq!(first_host(list), None, "{list}");
        }
    }

    #[test]
    fn tasks_of_each_host() {
        let counts = |text| (0..5).map(|node| tasks_of(text, node)).collect::<Vec<_>>();
        assert_eq!(counts("2(x3),1"), [Some(2), Some(2), Some(2), Some(1), None]);
        assert_eq!(counts("4"), [Some(4), None, None, None, None]);
        for broken in ["", "x", "2(x", "2(xy)", "2(x99999999999999999999)"] {
            assert_eq!(tasks_of(broken, 0), None, "{broken}");
        }
        assert_eq!(tasks_of("1(x18446744073709551615),1(x2)", usize::MAX), None, "a sum that overflows");
    }

    #[test]
    fn neighbouring_jobs_and_steps_have_other_ports() {
        let ports: Vec<u16> = [("100", "0"), ("100", "1"), ("101", "0"), ("4294967295", "4294967295")]
            .into_iter()
            .map(|(job, step)| port_of(job, step).unwrap_or(0))
            .collect();
        assert!(ports.iter().all(|port| (20_000..32_000).contains(port)), "{ports:?}");
        assert!(ports[0] != ports[1] && ports[0] != ports[2] && ports[1] != ports[2]);
        assert!(port_of("x", "0").is_err());
    }
}
