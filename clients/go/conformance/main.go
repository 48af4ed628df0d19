// The driver of the conformance suite: it does with the client what it is told on its standard input, one JSON object a
// line, and answers each with one on its standard output. ../../conformance/README.md has the protocol.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/keyturn/keyturn/clients/go"
	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

func main() {
	d := &driver{
		clients: map[string]*client{},
		calls:   map[string]*keyturn.Call{},
		kept:    map[string]any{},
	}
	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	in := bufio.NewReader(os.Stdin)
	for {
		line, err := in.ReadBytes('\n')
		if len(line) > 0 {
			if err := out.Encode(d.answer(line)); err != nil {
				fmt.Fprintln(os.Stderr, "the host is gone:", err)
				os.Exit(1)
			}
		}
		if err != nil {
			return
		}
	}
}

type driver struct {
	mu      sync.Mutex
	clients map[string]*client
	calls   map[string]*keyturn.Call
	kept    map[string]any // what `as` kept: a decision, a call, a secret, or the error that came instead
}

// client is a client with what its callbacks were called with.
type client struct {
	*keyturn.Client
	mu     sync.Mutex
	unsent []keyturn.Unsent
	asked  []map[string]any
}

type command struct {
	Op       string            `json:"op"`
	Client   string            `json:"client"`
	Call     string            `json:"call"`
	As       string            `json:"as"`
	Of       string            `json:"of"`
	Options  options           `json:"options"`
	Request  request           `json:"request"`
	Requests []request         `json:"requests"`
	Record   record            `json:"record"`
	Records  []record          `json:"records"`
	Commands []json.RawMessage `json:"commands"`
	Handle   string            `json:"handle"`
	Platform map[string]string `json:"platform"`
	Usage    usage             `json:"usage"`
	Micros   int64             `json:"micros"`
	Secret   string            `json:"secret"`

	Status    int    `json:"status"`
	ErrorCode string `json:"error_code"`

	Model          string          `json:"model"`
	Endpoint       string          `json:"endpoint"`
	ResponseTimeMS *float64        `json:"response_time_ms"`
	HTTPStatus     int             `json:"http_status"`
	Outcome        json.RawMessage `json:"outcome"`
	ErrorMessage   string          `json:"error_message"`
	RetryAfterMS   *float64        `json:"retry_after_ms"`

	TimeoutMS     *float64 `json:"timeout_ms"`
	CancelAfterMS *float64 `json:"cancel_after_ms"`
}

// A defect is what the driver cannot do, as opposed to what the client refuses.
type defect string

func (d defect) Error() string { return string(d) }

// answer carries out one command.
func (d *driver) answer(line []byte) (answer map[string]any) {
	defer func() {
		if raised := recover(); raised != nil {
			answer = map[string]any{"defect": fmt.Sprint("panic: ", raised)}
		}
	}()
	var c command
	if err := json.Unmarshal(line, &c); err != nil {
		return map[string]any{"defect": err.Error()}
	}
	ctx := context.Background()
	if c.CancelAfterMS != nil {
		cancelable, cancel := context.WithCancel(ctx)
		defer cancel()
		timer := time.AfterFunc(*span(c.CancelAfterMS), cancel)
		defer timer.Stop()
		ctx = cancelable
	}
	ok, err := d.run(ctx, c)
	if fault, isDefect := errors.AsType[defect](err); isDefect {
		return map[string]any{"defect": fault.Error()}
	}
	if err != nil {
		d.keep(c.As, err)
		return map[string]any{"error": errorJSON(err)}
	}
	return map[string]any{"ok": ok}
}

func (d *driver) run(ctx context.Context, c command) (any, error) {
	var with []keyturn.CallOption
	if c.TimeoutMS != nil {
		with = append(with, keyturn.WithTimeout(*span(c.TimeoutMS)))
	}
	switch c.Op {
	case "open":
		return none, d.open(c)
	case "parallel":
		answers := make([]any, len(c.Commands))
		var all sync.WaitGroup
		for i, each := range c.Commands {
			all.Go(func() { answers[i] = d.answer(each) })
		}
		all.Wait()
		return answers, nil
	case "outcome_of":
		return map[string]any{"outcome": keyturn.OutcomeOf(c.Status, c.ErrorCode).String()}, nil
	case "show":
		return d.show(c)
	case "close", "decide", "decide_many", "explain", "record", "record_many", "record_later", "flush", "unsent", "redeem",
		"begin", "when_down_asked":
		d.mu.Lock()
		named := d.clients[c.Client]
		d.mu.Unlock()
		if named == nil {
			return nil, defect("there is no client " + c.Client)
		}
		return d.withClient(ctx, named, c, with)
	}
	d.mu.Lock()
	named := d.calls[c.Call]
	d.mu.Unlock()
	if named == nil {
		return nil, defect(fmt.Sprintf("there is no op %q, or no call %q", c.Op, c.Call))
	}
	return withCall(ctx, named, c)
}

// none is the answer of what gives nothing.
var none = map[string]any{}

func (d *driver) open(c command) error {
	made := &client{}
	o := c.Options
	var token keyturn.Secret
	if o.Token != nil {
		token = keyturn.NewSecret(*o.Token)
	}
	opened, err := keyturn.NewClient(keyturn.Options{
		Target:           o.Target,
		Token:            token,
		RootCertificates: []byte(o.RootCertificates),
		CertificateChain: []byte(o.CertificateChain),
		PrivateKey:       keyturn.NewSecret(o.PrivateKey),
		TLS:              o.TLS,
		Timeout:          required(span(o.TimeoutMS)),
		Retries: keyturn.Retries{
			Attempts:   required(o.Retries.Attempts),
			FirstDelay: delay(o.Retries.FirstDelayMS), MaxDelay: delay(o.Retries.MaxDelayMS),
		},
		QueueSize:    o.QueueSize,
		CloseTimeout: delay(o.CloseTimeoutMS),
		WhenDown:     made.whenDown(o.WhenDown),
		OnUnsent: func(unsent keyturn.Unsent) {
			made.mu.Lock()
			defer made.mu.Unlock()
			made.unsent = append(made.unsent, unsent)
		},
	})
	if err != nil {
		return err
	}
	made.Client = opened
	d.mu.Lock()
	defer d.mu.Unlock()
	d.clients[c.Client] = made
	d.kept[c.Client] = opened
	return nil
}

func (c *client) whenDown(says string) func(context.Context, keyturn.DecideRequest, *keyturn.Error) (bool, error) {
	if says == "" {
		return nil
	}
	return func(_ context.Context, request keyturn.DecideRequest, fault *keyturn.Error) (bool, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.asked = append(c.asked, map[string]any{"user_id": request.UserID, "code": code.Code(fault.Code).String()})
		return says == "pass", nil
	}
}

func (d *driver) withClient(ctx context.Context, named *client, c command, with []keyturn.CallOption) (any, error) {
	switch c.Op {
	case "close":
		return map[string]any{"unsent": each(named.Close(), unsentJSON)}, nil
	case "flush":
		return none, named.Flush(ctx)
	case "unsent":
		named.mu.Lock()
		defer named.mu.Unlock()
		return each(named.unsent, unsentJSON), nil
	case "when_down_asked":
		named.mu.Lock()
		defer named.mu.Unlock()
		return append([]map[string]any{}, named.asked...), nil
	case "decide":
		decision, err := named.Decide(ctx, c.Request.value(), with...)
		if err != nil {
			return nil, err
		}
		d.keep(c.As, decision)
		return decisionJSON(decision), nil
	case "decide_many":
		results, err := named.DecideMany(ctx, each(c.Requests, request.value), with...)
		return each(results, func(result keyturn.DecideResult) any {
			return item(result.Err, func() any { return decisionJSON(result.Decision) })
		}), err
	case "explain":
		explanation, err := named.Explain(ctx, c.Request.value(), with...)
		if err != nil {
			return nil, err
		}
		return map[string]any{
			"decision": decisionJSON(explanation.Decision),
			"steps": each(explanation.Steps, func(step keyturn.ExplainStep) map[string]any {
				return map[string]any{"check": step.Check, "result": step.Result, "detail": step.Detail}
			}),
		}, nil
	case "redeem":
		secret, err := named.Redeem(ctx, keyturn.NewSealedHandle(c.Handle), with...)
		if err != nil {
			return nil, err
		}
		d.keep(c.As, secret)
		return map[string]any{"secret": secret.Reveal()}, nil
	case "begin":
		call, err := named.Request(ctx, c.Request.value(), with...)
		if err != nil {
			return nil, err
		}
		d.keep(c.As, call)
		d.mu.Lock()
		d.calls[c.As] = call
		d.mu.Unlock()
		return callJSON(call), nil
	case "record", "record_later":
		record, err := d.recordRequest(c.Record)
		if err != nil {
			return nil, err
		}
		if c.Op == "record_later" {
			return none, named.RecordLater(record)
		}
		recorded, err := named.Record(ctx, record, with...)
		return recordedJSON(recorded), err
	}
	records := make([]keyturn.RecordRequest, len(c.Records))
	for i, each := range c.Records {
		var err error
		if records[i], err = d.recordRequest(each); err != nil {
			return nil, err
		}
	}
	results, err := named.RecordMany(ctx, records, with...)
	return each(results, func(result keyturn.RecordResult) any {
		return item(result.Err, func() any { return recordedJSON(result.Recorded) })
	}), err
}

func withCall(ctx context.Context, call *keyturn.Call, c command) (any, error) {
	switch c.Op {
	case "headers":
		return call.Headers(c.Platform)
	case "sending":
		return none, call.Sending()
	case "succeeded":
		return none, call.Succeeded()
	case "used":
		return none, call.Used(keyturn.Usage(c.Usage))
	case "cost":
		return none, call.Cost(c.Micros)
	case "note":
		return none, call.Note(keyturn.Note{
			Model: c.Model, Endpoint: c.Endpoint, ResponseTime: spanOrZero(c.ResponseTimeMS), HTTPStatus: c.HTTPStatus,
		})
	case "failed", "key_refused":
		outcome, err := outcomeOf(c.Outcome)
		if err != nil {
			return nil, err
		}
		failure := keyturn.Failure{
			Outcome: outcome, HTTPStatus: c.HTTPStatus, ErrorMessage: c.ErrorMessage, RetryAfter: span(c.RetryAfterMS),
		}
		if c.Op == "failed" {
			return none, call.Failed(failure)
		}
		if err := call.KeyRefused(ctx, failure); err != nil {
			return nil, err
		}
		return callJSON(call), nil
	case "finish":
		recorded, err := call.Finish(ctx)
		return recordedJSON(recorded), err
	case "end":
		call.Close()
		return none, nil
	}
	return nil, defect("there is no op " + c.Op)
}

func (d *driver) keep(name string, value any) {
	if name != "" {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.kept[name] = value
	}
}

func (d *driver) recordRequest(r record) (keyturn.RecordRequest, error) {
	outcome, err := outcomeOf(r.Outcome)
	if err != nil {
		return keyturn.RecordRequest{}, err
	}
	value := keyturn.RecordRequest{
		Outcome: outcome, CostMicros: r.CostMicros, Model: r.Model, Endpoint: r.Endpoint,
		ResponseTime: spanOrZero(r.ResponseTimeMS), HTTPStatus: r.HTTPStatus, ErrorMessage: r.ErrorMessage,
		RetryAfter: span(r.RetryAfterMS),
	}
	if r.Usage != nil {
		value.Usage = new(keyturn.Usage(*r.Usage))
	}
	switch {
	case r.Handle != "":
		value.Settles = keyturn.NewSealedHandle(r.Handle)
	case r.Ticket != "":
		value.Settles = keyturn.NewSealedTicket(r.Ticket)
	default:
		d.mu.Lock()
		defer d.mu.Unlock()
		switch kept := d.kept[r.Decision].(type) {
		case *keyturn.Decision:
			value.Settles = kept
		case *keyturn.Call:
			value.Settles = kept.Decision()
		default:
			return value, defect("there is no decision " + r.Decision)
		}
	}
	return value, nil
}

func outcomeOf(given json.RawMessage) (keyturn.Outcome, error) {
	var number int32
	var word string
	switch {
	case len(given) == 0 || string(given) == "null":
		return keyturn.OutcomeUnspecified, nil
	case json.Unmarshal(given, &number) == nil:
		return keyturn.Outcome(number), nil
	case json.Unmarshal(given, &word) == nil:
		if number, ok := keyturnv1.Outcome_value["OUTCOME_"+word]; ok {
			return keyturn.Outcome(number), nil
		}
	}
	return 0, defect("there is no outcome " + string(given))
}

func span(milliseconds *float64) *time.Duration {
	if milliseconds == nil {
		return nil
	}
	return new(time.Duration(*milliseconds * float64(time.Millisecond)))
}

func spanOrZero(milliseconds *float64) time.Duration {
	if milliseconds == nil {
		return 0
	}
	return *span(milliseconds)
}

// required is an option that cannot be zero: to Go's client a zero is not given, so that one which the host gives is given as
// another value that cannot work.
func required[T int | time.Duration](given *T) T {
	switch {
	case given == nil:
		return 0
	case *given == 0:
		return -1
	}
	return *given
}

// delay is a span whose zero means the default to the client, and none to the host.
func delay(milliseconds *float64) time.Duration {
	if milliseconds != nil && *milliseconds == 0 {
		return 1
	}
	return spanOrZero(milliseconds)
}

func each[From, To any](items []From, change func(From) To) []To {
	changed := make([]To, len(items))
	for i, item := range items {
		changed[i] = change(item)
	}
	return changed
}

// kinds are the names of the errors, the first that matches counts.
var kinds = []struct {
	kind error
	name string
}{
	{context.Canceled, "Cancelled"},
	{keyturn.ErrClosed, "Closed"},
	{keyturn.ErrQueueFull, "QueueFull"},
	{keyturn.ErrInvalid, "Invalid"},
	{keyturn.ErrEnded, "Invalid"},
	{keyturn.ErrInvalidArgument, "InvalidArgument"},
	{keyturn.ErrUnauthenticated, "Unauthenticated"},
	{keyturn.ErrPermissionDenied, "PermissionDenied"},
	{keyturn.ErrNotFound, "NotFound"},
	{keyturn.ErrAlreadyExists, "AlreadyExists"},
	{keyturn.ErrFailedPrecondition, "FailedPrecondition"},
	{keyturn.ErrResourceExhausted, "ResourceExhausted"},
	{keyturn.ErrDeadlineExceeded, "DeadlineExceeded"},
	{keyturn.ErrUnavailable, "Unavailable"},
	{keyturn.ErrInternal, "InternalError"},
}

func errorJSON(err error) map[string]any {
	shown := map[string]any{"kind": "KeyturnError", "text": err.Error()}
	for _, each := range kinds {
		if errors.Is(err, each.kind) {
			shown["kind"] = each.name
			break
		}
	}
	if denied, ok := errors.AsType[*keyturn.DeniedError](err); ok {
		shown["kind"], shown["decision"] = "Denied", decisionJSON(denied.Decision)
		return shown
	}
	fault, ok := errors.AsType[*keyturn.Error](err)
	if !ok {
		return shown
	}
	shown["code"] = code.Code(fault.Code).String()
	shown["reason"] = fault.Reason
	shown["message"] = fault.Message
	shown["field_violations"] = each(fault.FieldViolations, func(violation keyturn.FieldViolation) map[string]any {
		return map[string]any{"field": violation.Field, "description": violation.Description}
	})
	shown["retry_after_ms"] = milliseconds(fault.RetryAfter)
	shown["metadata"] = none
	if fault.Metadata != nil {
		shown["metadata"] = fault.Metadata
	}
	if found := fault.Resource; found != nil {
		shown["resource"] = map[string]any{"type": found.Type, "name": found.Name, "description": found.Description}
	}
	return shown
}

func item(err error, ok func() any) any {
	if err != nil {
		return map[string]any{"error": errorJSON(err)}
	}
	return map[string]any{"ok": ok()}
}

func decisionJSON(decision *keyturn.Decision) map[string]any {
	shown := map[string]any{
		"decision_id": decision.DecisionID, "mode": decision.Mode.String(), "reason": decision.Reason.String(),
		"message": decision.Message, "degraded": decision.Degraded, "replayed": decision.Replayed,
		"unmetered": decision.Unmetered, "allowed": decision.Allowed(), "key": nil, "ticket": nil, "denial": nil,
	}
	if key := decision.Key; key != nil {
		var secret any
		if key.Secret != nil {
			secret = key.Secret.Reveal()
		}
		shown["key"] = map[string]any{
			"handle": key.Handle.Text(), "key_id": key.KeyID, "provider": key.Provider, "hint": key.Hint, "secret": secret,
			"auth_header": key.AuthHeader, "auth_prefix": key.AuthPrefix, "base_url": key.BaseURL,
			"expire_time": moment(key.ExpireTime),
		}
	}
	if ticket := decision.Ticket; ticket != nil {
		shown["ticket"] = map[string]any{
			"ticket": ticket.Ticket.Text(), "hold_micros": ticket.HoldMicros, "available_micros": ticket.AvailableMicros,
			"expire_time": moment(ticket.ExpireTime),
		}
	}
	if denial := decision.Denial; denial != nil {
		shown["denial"] = map[string]any{
			"reason": denial.Reason.String(), "retryable": denial.Retryable,
			"retry_after_ms": milliseconds(denial.RetryAfter), "suggestion": denial.Suggestion,
		}
	}
	return shown
}

func callJSON(call *keyturn.Call) map[string]any {
	shown := decisionJSON(call.Decision())
	shown["request_id"] = call.RequestID()
	return shown
}

func recordedJSON(recorded *keyturn.Recorded) any {
	if recorded == nil {
		return nil
	}
	return map[string]any{
		"record_id": recorded.RecordID, "charged_micros": recorded.ChargedMicros,
		"released_micros": recorded.ReleasedMicros, "balance_micros": recorded.BalanceMicros,
		"cost_source": recorded.CostSource.String(), "replayed": recorded.Replayed,
		"durability": recorded.Durability.String(), "key_state": recorded.KeyState.String(),
	}
}

func unsentJSON(unsent keyturn.Unsent) map[string]any {
	shown := map[string]any{"outcome": unsent.Record.Outcome.String(), "error": errorJSON(unsent.Err)}
	settles := unsent.Record.Settles
	if decision, ok := settles.(*keyturn.Decision); ok {
		switch {
		case decision.Key != nil:
			settles = decision.Key
		case decision.Ticket != nil:
			settles = decision.Ticket
		}
	}
	switch settled := settles.(type) {
	case keyturn.SealedHandle:
		shown["handle"] = settled.Text()
	case *keyturn.KeyHandle:
		shown["handle"] = settled.Handle.Text()
	case keyturn.SealedTicket:
		shown["ticket"] = settled.Text()
	case *keyturn.CreditTicket:
		shown["ticket"] = settled.Ticket.Text()
	}
	return shown
}

// milliseconds is a span that the client gives out, where zero means that there is none.
func milliseconds(span time.Duration) any {
	if span == 0 {
		return nil
	}
	return float64(span) / float64(time.Millisecond)
}

func moment(when time.Time) any {
	if when.IsZero() {
		return nil
	}
	return when.UTC().Format(time.RFC3339Nano)
}
