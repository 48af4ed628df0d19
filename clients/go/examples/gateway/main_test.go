package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/keyturn/keyturn/clients/go"
	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

// A world is a sidecar, a provider and a gateway between them.
type world struct {
	keyturnv1.UnimplementedRoutingServiceServer
	t        *testing.T
	provider http.HandlerFunc
	// decide answers; by default with an own key, and with credits where one was refused.
	decide func(*keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error)

	target, upstream string
	client           *keyturn.Client
	gateway          *gateway
	server           *httptest.Server

	mu      sync.Mutex
	asked   []*keyturnv1.DecideRequest
	records []*keyturnv1.RecordRequest
}

func newWorld(t *testing.T, provider http.HandlerFunc) *world {
	t.Helper()
	w := &world{t: t, provider: provider}
	upstream := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { w.provider(rw, r) }))
	t.Cleanup(upstream.Close)
	w.upstream = upstream.URL + "/v1"
	directory, err := os.MkdirTemp("", "kt")
	require(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(directory) })
	listener, err := net.Listen("unix", filepath.Join(directory, "k.sock"))
	require(t, err)
	sidecar := grpc.NewServer()
	keyturnv1.RegisterRoutingServiceServer(sidecar, w)
	go func() { _ = sidecar.Serve(listener) }()
	t.Cleanup(sidecar.Stop)
	w.target = "unix:" + listener.Addr().String()
	w.client, err = keyturn.NewClient(keyturn.Options{
		Target: w.target, Timeout: 20 * time.Second, CloseTimeout: 20 * time.Second, Retries: keyturn.Retries{Attempts: 1},
	})
	require(t, err)
	t.Cleanup(func() { w.client.Close() })
	w.gateway = newGateway(w.client, keyturn.NewSecret("sk-platform"), w.upstream)
	w.server = httptest.NewServer(w.gateway.handler())
	t.Cleanup(w.server.Close)
	return w
}

func (w *world) Decide(_ context.Context, r *keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked = append(w.asked, r)
	if w.decide != nil {
		return w.decide(r)
	}
	if len(r.GetFailedKeyHandles()) > 0 {
		return credits(), nil
	}
	return w.key("sk-own"), nil
}

func (w *world) key(secret string) *keyturnv1.DecideResponse {
	return &keyturnv1.DecideResponse{Route: &keyturnv1.DecideResponse_Key{Key: &keyturnv1.KeyHandle{
		Handle: "handle-of-" + secret, Secret: secret, BaseUrl: w.upstream,
		Auth: &keyturnv1.KeyHandle_Auth{Header: "Authorization", Prefix: "Bearer "},
	}}}
}

func credits() *keyturnv1.DecideResponse {
	return &keyturnv1.DecideResponse{Route: &keyturnv1.DecideResponse_Ticket{Ticket: &keyturnv1.CreditTicket{Ticket: "ticket"}}}
}

func denial(retryable bool) *keyturnv1.DecideResponse {
	return &keyturnv1.DecideResponse{Message: "No.", Route: &keyturnv1.DecideResponse_Denial{Denial: &keyturnv1.Denial{
		Reason: keyturnv1.DenialReason_DENIAL_REASON_INSUFFICIENT_CREDITS, Retryable: retryable,
		RetryAfter: durationpb.New(1500 * time.Millisecond),
	}}}
}

func (w *world) Record(_ context.Context, r *keyturnv1.RecordRequest) (*keyturnv1.RecordResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.records = append(w.records, r)
	return &keyturnv1.RecordResponse{}, nil
}

func (w *world) BatchRecord(_ context.Context, r *keyturnv1.BatchRecordRequest) (*keyturnv1.BatchRecordResponse, error) {
	response := &keyturnv1.BatchRecordResponse{}
	for _, each := range r.GetRequests() {
		recorded, _ := w.Record(context.Background(), each)
		response.Results = append(response.Results, &keyturnv1.BatchRecordResult{
			Result: &keyturnv1.BatchRecordResult_Response{Response: recorded},
		})
	}
	return response, nil
}

// recorded waits until the gateway is idle, and returns all records.
func (w *world) recorded() []*keyturnv1.RecordRequest {
	w.t.Helper()
	w.gateway.running.Wait()
	require(w.t, w.client.Flush(context.Background()))
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]*keyturnv1.RecordRequest(nil), w.records...)
}

type reply struct {
	*http.Response
	body string
}

func (r reply) errorCode() string {
	var said struct{ Error struct{ Type, Code string } }
	_ = json.Unmarshal([]byte(r.body), &said)
	return said.Error.Type + "/" + said.Error.Code
}

func (w *world) post(body string) reply {
	w.t.Helper()
	return w.postAs("Bearer u1", body)
}

func (w *world) postAs(authorization, body string) reply {
	w.t.Helper()
	request, err := http.NewRequest(http.MethodPost, w.server.URL+endpoint, strings.NewReader(body))
	require(w.t, err)
	request.Header.Set("Content-Type", "application/json; charset=utf-8")
	request.Header.Set("Authorization", authorization)
	request.Header.Set("X-Own", "of the caller")
	response, err := http.DefaultClient.Do(request)
	require(w.t, err)
	defer func() { _ = response.Body.Close() }()
	answered, _ := io.ReadAll(response.Body)
	return reply{response, string(answered)}
}

const (
	hello = `{"model": "gpt-4o", "max_tokens": 5, "messages": [{"role": "user", "content": "Hello"}]}`
	good  = `{"model": "gpt-4o-2024", "usage": {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 11, "prompt_tokens_details": {"cached_tokens": 2}}}`
)

func answering(status int, header, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if name, value, ok := strings.Cut(header, ": "); ok {
			w.Header().Set(name, value)
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

func TestAnAnswerGoesBackAsItIsAndIsRecorded(t *testing.T) {
	w := newWorld(t, nil)
	w.provider = func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		equal(t, "path", r.URL.Path, "/v1/chat/completions")
		equal(t, "body", string(body), hello)
		equal(t, "signed", r.Header.Get("Authorization"), "Bearer sk-own")
		equal(t, "content type", r.Header.Get("Content-Type"), "application/json; charset=utf-8")
		equal(t, "the caller's own header", r.Header.Get("X-Own"), "")
		answering(http.StatusCreated, "Content-Type: application/x-own", good)(rw, r)
	}
	answer := w.post(hello)
	equal(t, "status", answer.StatusCode, http.StatusCreated)
	equal(t, "content type", answer.Header.Get("Content-Type"), "application/x-own")
	equal(t, "body", answer.body, good)
	asked := w.asked[0]
	equal(t, "user", asked.GetUserId(), "u1")
	equal(t, "provider and model", asked.GetProvider()+" "+asked.GetModel()+" "+asked.GetServiceType(), "openai gpt-4o gateway")
	equal(t, "output estimate", asked.GetTokens().GetMaxOutputTokens(), 5)
	equal(t, "input estimate", asked.GetTokens().GetInputTokens(), int64(len(hello)/4))
	records := w.recorded()
	equal(t, "records", len(records), 1)
	record := records[0]
	equal(t, "outcome", record.GetOutcome(), keyturnv1.Outcome_OUTCOME_SUCCESS)
	equal(t, "settles", record.GetKeyHandle(), "handle-of-sk-own")
	equal(t, "model", record.GetModel(), "gpt-4o-2024")
	usage := record.GetUsage()
	equal(t, "usage", [4]int64{usage.GetInputTokens(), usage.GetOutputTokens(), usage.GetCacheReadTokens(), usage.GetTotalTokens()}, [4]int64{3, 7, 2, 11})
}

func TestWithoutALimitThereIsNoEstimate(t *testing.T) {
	w := newWorld(t, answering(200, "", good))
	w.post(`{"model": "m"}`)
	w.post(`{"model": "m", "max_tokens": 5, "max_completion_tokens": 9}`)
	equal(t, "no estimate", w.asked[0].GetEstimate() == nil, true)
	equal(t, "the better limit", w.asked[1].GetTokens().GetMaxOutputTokens(), 9)
}

func TestWhenCreditsPayThePlatformSigns(t *testing.T) {
	w := newWorld(t, nil)
	w.decide = func(*keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) { return credits(), nil }
	w.provider = func(rw http.ResponseWriter, r *http.Request) {
		equal(t, "signed", r.Header.Get("Authorization"), "Bearer sk-platform")
		answering(200, "", good)(rw, r)
	}
	equal(t, "status", w.post(hello).StatusCode, 200)
	equal(t, "settles", w.recorded()[0].GetCreditTicket(), "ticket")
}

func chunk(content string) string { return "data: {\"choices\": [], " + content + "}\n\n" }

func TestAStreamGoesBackChunkByChunk(t *testing.T) {
	w, next := newWorld(t, nil), make(chan struct{})
	w.provider = func(rw http.ResponseWriter, r *http.Request) {
		var body struct {
			Stream        bool
			Model         string
			StreamOptions map[string]any `json:"stream_options"`
		}
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			t.Error(err)
		}
		equal(t, "usage is asked for", body.StreamOptions["include_usage"], any(true))
		equal(t, "what the caller said stays", body.StreamOptions["own"], any("yes"))
		equal(t, "so does the rest", body.Model, "gpt-4o")
		rw.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
		_, _ = io.WriteString(rw, chunk(`"model": "gpt-4o-2024"`))
		_ = http.NewResponseController(rw).Flush()
		<-next // the first chunk is with the caller
		usage := chunk(`"usage": {"prompt_tokens": 3, "completion_tokens": 7}`)
		_, _ = io.WriteString(rw, usage[:20])
		_ = http.NewResponseController(rw).Flush()
		_, _ = io.WriteString(rw, usage[20:]+"data: [DONE]")
	}
	request, err := http.NewRequest(http.MethodPost, w.server.URL+endpoint,
		strings.NewReader(`{"model": "gpt-4o", "stream": true, "stream_options": {"include_usage": false, "own": "yes"}}`))
	require(t, err)
	request.Header.Set("Authorization", "Bearer u1")
	response, err := http.DefaultClient.Do(request)
	require(t, err)
	defer func() { _ = response.Body.Close() }()
	equal(t, "content type", response.Header.Get("Content-Type"), "text/event-stream; charset=utf-8")
	lines := bufio.NewReader(response.Body)
	first, err := lines.ReadString('\n')
	require(t, err)
	equal(t, "the first chunk", first+"\n", chunk(`"model": "gpt-4o-2024"`))
	close(next)
	_, err = io.ReadAll(lines)
	require(t, err)
	record := w.recorded()[0]
	equal(t, "outcome", record.GetOutcome(), keyturnv1.Outcome_OUTCOME_SUCCESS)
	equal(t, "model", record.GetModel(), "gpt-4o-2024")
	equal(t, "output tokens", record.GetUsage().GetOutputTokens(), 7)
}

func TestAStreamThatBreaksOffIsAProviderErrorWithTheUsageSoFar(t *testing.T) {
	w := newWorld(t, answering(200, "Content-Type: text/event-stream", chunk(`"usage": {"completion_tokens": 4}`)))
	request, err := http.NewRequest(http.MethodPost, w.server.URL+endpoint, strings.NewReader(`{"stream": true}`))
	require(t, err)
	request.Header.Set("Authorization", "Bearer u1")
	response, err := http.DefaultClient.Do(request)
	require(t, err)
	_, err = io.ReadAll(response.Body)
	_ = response.Body.Close()
	equal(t, "the caller sees it", err != nil, true)
	record := w.recorded()[0]
	equal(t, "outcome", record.GetOutcome(), keyturnv1.Outcome_OUTCOME_PROVIDER_ERROR)
	equal(t, "usage", record.GetUsage().GetOutputTokens(), 4)
}

func TestACallerThatHangsUpEndsTheRequestToTheProvider(t *testing.T) {
	ended := make(chan struct{})
	for _, kind := range []string{"application/json", "text/event-stream"} {
		w, came := newWorld(t, nil), make(chan struct{})
		w.provider = func(rw http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			rw.Header().Set("Content-Type", kind)
			_, _ = io.WriteString(rw, chunk(`"usage": {"completion_tokens": 4}`))
			_ = http.NewResponseController(rw).Flush()
			close(came)
			<-r.Context().Done()
			ended <- struct{}{}
		}
		ctx, cancel := context.WithCancel(t.Context())
		request, err := http.NewRequestWithContext(ctx, http.MethodPost, w.server.URL+endpoint, strings.NewReader(`{"stream": true}`))
		require(t, err)
		request.Header.Set("Authorization", "Bearer u1")
		go func() { <-came; cancel() }()
		if response, err := http.DefaultClient.Do(request); err == nil {
			_, _ = io.Copy(io.Discard, response.Body)
			_ = response.Body.Close()
		}
		<-ended
		records := w.recorded()
		equal(t, kind+": records", len(records), 1)
		equal(t, kind+": outcome", records[0].GetOutcome(), keyturnv1.Outcome_OUTCOME_CLIENT_CANCELLED)
	}
}

func TestARefusedAnswerIsRecordedAndGoesBack(t *testing.T) {
	for name, each := range map[string]struct {
		status int
		body   string
		want   keyturnv1.Outcome
	}{
		"a bad request": {400, `{"error": {"message": "too long", "type": "invalid_request_error", "code": null}}`, keyturnv1.Outcome_OUTCOME_REFUSED},
		"a redirect":    {307, ``, keyturnv1.Outcome_OUTCOME_PROVIDER_ERROR},
		"no JSON":       {502, `<html>`, keyturnv1.Outcome_OUTCOME_PROVIDER_ERROR},
		"no money":      {429, `{"error": {"message": "too long", "code": "insufficient_quota"}}`, keyturnv1.Outcome_OUTCOME_PROVIDER_BILLING},
	} {
		w := newWorld(t, answering(each.status, "Retry-After: 20", each.body))
		w.decide = func(*keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) { return credits(), nil }
		answer := w.post(hello)
		equal(t, name+": status", answer.StatusCode, each.status)
		equal(t, name+": body", answer.body, each.body)
		records := w.recorded()
		equal(t, name+": records", len(records), 1)
		equal(t, name+": outcome", records[0].GetOutcome(), each.want)
		equal(t, name+": HTTP status", records[0].GetHttpStatus(), int32(each.status))
		equal(t, name+": retry after", records[0].GetRetryAfter().GetSeconds(), 20)
		if strings.Contains(each.body, "too long") {
			equal(t, name+": message", records[0].GetErrorMessage(), "too long")
		}
	}
}

func TestARefusedKeyIsLeftOutBeforeAnythingGoesToTheCaller(t *testing.T) {
	w := newWorld(t, func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "Bearer sk-own" {
			answering(401, "", `{"error": {"message": "bad key"}}`)(rw, r)
			return
		}
		answering(200, "", good)(rw, r)
	})
	answer := w.post(hello)
	equal(t, "status", answer.StatusCode, 200)
	equal(t, "body", answer.body, good)
	records := w.recorded()
	equal(t, "records", len(records), 2)
	equal(t, "the key", records[0].GetOutcome(), keyturnv1.Outcome_OUTCOME_AUTH_REJECTED)
	equal(t, "its message", records[0].GetErrorMessage(), "bad key")
	equal(t, "the ticket", records[1].GetCreditTicket(), "ticket")
	equal(t, "its outcome", records[1].GetOutcome(), keyturnv1.Outcome_OUTCOME_SUCCESS)
}

func TestWhenNobodyElseMayPayTheProvidersAnswerGoesBack(t *testing.T) {
	w := newWorld(t, answering(401, "", "bad key"))
	w.decide = func(r *keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
		if len(r.GetFailedKeyHandles()) > 0 {
			return denial(false), nil
		}
		return w.key("sk-own"), nil
	}
	answer := w.post(hello)
	equal(t, "status", answer.StatusCode, 401)
	equal(t, "body", answer.body, "bad key")
	equal(t, "records", len(w.recorded()), 1)
}

func TestThreeKeysAreTriedAtMost(t *testing.T) {
	w := newWorld(t, answering(429, "", "slow down"))
	w.decide = func(r *keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
		return w.key("sk-" + string(rune('a'+len(r.GetFailedKeyHandles())))), nil
	}
	answer := w.post(hello)
	equal(t, "status", answer.StatusCode, 429)
	equal(t, "body", answer.body, "slow down")
	records := w.recorded()
	equal(t, "records", len(records), 3)
	for _, record := range records {
		equal(t, "outcome", record.GetOutcome(), keyturnv1.Outcome_OUTCOME_RATE_LIMITED)
	}
}

func TestAProviderThatCannotBeReachedWasNeverSent(t *testing.T) {
	w := newWorld(t, nil)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	require(t, err)
	require(t, closed.Close())
	w.upstream = "http://" + closed.Addr().String()
	answer := w.post(hello)
	equal(t, "status", answer.StatusCode, 502)
	equal(t, "code", answer.errorCode(), "keyturn/never_sent")
	equal(t, "outcome", w.recorded()[0].GetOutcome(), keyturnv1.Outcome_OUTCOME_NEVER_SENT)
}

func TestAProviderThatHangsUpIsAProviderError(t *testing.T) {
	w := newWorld(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	equal(t, "status", w.post(hello).StatusCode, 502)
	equal(t, "outcome", w.recorded()[0].GetOutcome(), keyturnv1.Outcome_OUTCOME_PROVIDER_ERROR)
}

func TestAProviderThatSaysNothingTimesOut(t *testing.T) {
	w := newWorld(t, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
	})
	w.gateway.timeout = 30 * time.Millisecond
	equal(t, "status", w.post(hello).StatusCode, 504)
	equal(t, "outcome", w.recorded()[0].GetOutcome(), keyturnv1.Outcome_OUTCOME_TIMEOUT)
}

func TestItsOwnErrorsHaveOpenAIsForm(t *testing.T) {
	fault := func(code codes.Code, reason string) func(*keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
		return func(*keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
			made, err := status.New(code, "No.").WithDetails(&errdetails.ErrorInfo{Reason: reason})
			require(t, err)
			return nil, made.Err()
		}
	}
	denied := func(retryable bool) func(*keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
		return func(*keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) { return denial(retryable), nil }
	}
	w := newWorld(t, answering(200, "", good))
	for name, each := range map[string]struct {
		authorization, body string
		decide              func(*keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error)
		status              int
		code, retryAfter    string
	}{
		"no token":         {"", hello, nil, 401, "missing_token", ""},
		"an empty token":   {"Bearer ", hello, nil, 401, "missing_token", ""},
		"no bearer":        {"Basic dTE=", hello, nil, 401, "missing_token", ""},
		"no JSON":          {"Bearer u1", "hello", nil, 400, "invalid_body", ""},
		"no object":        {"Bearer u1", "[]", nil, 400, "invalid_body", ""},
		"odd options":      {"Bearer u1", `{"stream": true, "stream_options": 1}`, nil, 400, "invalid_body", ""},
		"denied":           {"Bearer u1", hello, denied(false), 402, "insufficient_credits", ""},
		"denied for now":   {"Bearer u1", hello, denied(true), 429, "insufficient_credits", "2"},
		"unavailable":      {"Bearer u1", hello, fault(codes.Unavailable, "STORE_UNAVAILABLE"), 503, "sidecar_unavailable", "1"},
		"too late":         {"Bearer u1", hello, fault(codes.DeadlineExceeded, ""), 503, "sidecar_unavailable", "1"},
		"an unknown user":  {"Bearer u1", hello, fault(codes.NotFound, "USER_NOT_FOUND"), 401, "unknown_user", ""},
		"another fault":    {"Bearer u1", hello, fault(codes.InvalidArgument, "INVALID_FIELD"), 500, "invalid_field", ""},
		"one that is bare": {"Bearer u1", hello, fault(codes.Internal, ""), 500, "internal", ""},
	} {
		w.decide = each.decide
		answer := w.postAs(each.authorization, each.body)
		equal(t, name+": status", answer.StatusCode, each.status)
		equal(t, name+": code", answer.errorCode(), "keyturn/"+each.code)
		equal(t, name+": retry after", answer.Header.Get("Retry-After"), each.retryAfter)
	}
	equal(t, "records", len(w.recorded()), 0)
}

func TestTheProgramServesUntilItIsTerminated(t *testing.T) {
	w := newWorld(t, answering(200, "", good))
	program := filepath.Join(t.TempDir(), "gateway")
	if output, err := exec.Command("go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	var logged bytes.Buffer
	run := exec.Command(program)
	run.Env = append(os.Environ(), "KEYTURN_ADDRESS="+w.target, "LISTEN=127.0.0.1:0", "OPENAI_API_KEY=sk-platform", "OPENAI_BASE_URL="+w.upstream)
	run.Stderr = &logged
	out, err := run.StdoutPipe()
	require(t, err)
	require(t, run.Start())
	t.Cleanup(func() { _ = run.Process.Kill() })
	line, err := bufio.NewReader(out).ReadString('\n')
	require(t, err)
	address, ok := strings.CutPrefix(strings.TrimSpace(line), "listening on ")
	equal(t, "it says where it listens", ok, true)
	health, err := http.Get(address + "/healthz")
	require(t, err)
	_ = health.Body.Close()
	equal(t, "health", health.StatusCode, 200)
	w.server.URL = address
	equal(t, "status", w.post(hello).StatusCode, 200)
	require(t, run.Process.Signal(syscall.SIGTERM))
	if err := run.Wait(); err != nil {
		t.Errorf("it ended with %v: %s", err, logged.String())
	}
	equal(t, "records, flushed before its end", len(w.recorded()), 1)
	equal(t, "what it logged", logged.String(), "")
}

func require(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func equal[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}
